"""The output layer of a policy as tensors, and the two results computed with it: token log-probs, contrastive loss.

N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError
from macpo.engine.models.vocab_parallel import own_rows, vocab_shard
from macpo.kernels import VocabShard, linear_logp
from macpo.kernels import pair_loss as fused_pair_loss
from macpo.kernels.pair_loss.result import PairLoss
from macpo.kernels.transfer import to_device


class Head(NamedTuple):
    """logits = softcap·tanh(logit_scale·(hidden @ weightᵀ + bias) / softcap), without tanh where softcap is None."""

    weight: Tensor
    """[V, H]; with `shard`, this rank's rows."""
    bias: Tensor | None
    """[V]; with `shard`, this rank's rows."""
    shard: VocabShard | None = None
    """Set if tensor parallelism splits the vocabulary."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def rest(self) -> dict[str, Any]:
        """All but the weight, by the names of the operators' arguments."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}


def head_of(model: PreTrainedModel) -> Head:
    """The model's output layer with the scale and softcap that its architecture's config names.

    Raises:
        ConfigError: an output layer that is not linear, an adapter on it that is not plain LoRA, or a class that does
            not tell its output layer from what lies below.
    """
    if model.base_model is model:
        problem = f"{type(model).__name__} does not name the model below its output layer (base_model_prefix)"
        raise ConfigError(problem, "use the family's text-only model, or one such as Llama, Qwen, Mistral or Gemma 3")
    config = model.config.get_text_config()
    factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    factors.append(1.0 / divisor if divisor else None)
    scale = 1.0
    for factor in factors:
        scale *= 1.0 if factor is None else float(factor)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = linear_head(model.get_output_embeddings())
    return head._replace(logit_scale=scale, softcap=float(softcap) if softcap else None)


def linear_head(layer: nn.Module) -> Head:
    """Weight and bias of an output layer, with its LoRA added so that gradients reach A and B.

    Raises:
        ConfigError: a layer that is not linear, or an adapter on it that is not plain LoRA.
    """
    if not isinstance(layer, LoraLayer):
        if isinstance(layer, AuxiliaryTrainingWrapper):
            fix = "leave it out of modules_to_save and trainable_token_indices, or merge the adapter into its base"
            raise ConfigError(f"the adapter replaces the output layer ({type(layer).__name__})", fix)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"the output layer is a {type(layer).__name__}", "use a model with a linear lm_head")
        shard = vocab_shard(layer.weight)
        rows = whole if shard is None else own_rows
        return Head(rows(layer.weight), None if layer.bias is None else rows(layer.bias), shard)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    adapters: tuple[Any, Any] = (layer.lora_A, layer.lora_B)
    if not is_plain(layer):
        raise ConfigError("the adapter on the output layer is not plain LoRA", "leave lm_head out of target_modules")
    base: Any = layer.get_base_layer()
    shard = vocab_shard(base.weight)
    rows = whole if shard is None else own_rows
    weight = rows(base.weight)
    if not layer.disable_adapters and not layer.merged:
        for name in names:
            a = whole(adapters[0][name].weight)  # every rank holds A and adds its rows' share to A's gradient
            delta = rows(adapters[1][name].weight) @ (a if shard is None else shard.replicated(a))
            weight = weight + (delta * layer.scaling[name]).to(weight.dtype)
    return Head(weight, None if base.bias is None else rows(base.bias), shard)


def is_plain(layer: LoraLayer) -> bool:
    """Whether the layer's adapters are linear, W' = W + s B A: no variant such as DoRA, no bias of their own."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return isinstance(layer, LoraLinear) and not any(layer.lora_variant.get(n) or layer.lora_bias.get(n) for n in names)


def whole(weight: Tensor) -> Tensor:
    """The whole of a weight that is sharded over ranks; its gradient goes back to the shards."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def response_logps(rows: Tensor, head: Head, batch: PackedBatch) -> Tensor:
    """Log-prob of each of the batch's response tokens, [N] float32, from the hidden states `rows` [N, H] before it."""
    return linear_logp(rows, head.weight, batch.target.to(rows.device), **head.rest)


def pair_loss(
    rows: Tensor, head: Head, batch: PackedBatch, ref_logps: Tensor | None = None, **options: Any
) -> PairLoss:
    """Compute `macpo.kernels.pair_loss` of a packed batch of pairs through this head.

    Args:
        rows: [N, H] hidden states that predict the response tokens.
        ref_logps: [2B] log-probs of the sequences under the reference, in the order c0, r0, c1, r1, ...
        options: the loss and its settings, and `num_pairs`, as the operator takes them.
    """
    target, ref_logps = batch.target.to(rows.device), None if ref_logps is None else to_device(ref_logps, rows.device)
    return fused_pair_loss(rows, head.weight, target, batch.cu_rows, ref_logps, **head.rest, **options)


class _Alias(torch.autograd.Function):
    """The same memory behind a separate storage, see `aliased`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.from_dlpack(weight.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def aliased(head: Head) -> Head:
    """The head with its CPU weights behind separate storages.

    The kernels hand weights to C++ as numpy arrays, whose storage can no longer be resized, and FSDP2 frees gathered
    weights by resizing them.
    """
    bias = None if head.bias is None else _Alias.apply(head.bias)
    return head._replace(weight=_Alias.apply(head.weight), bias=bias)
