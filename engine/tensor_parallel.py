"""Tensor parallelism by the model's own plan: transformers' `base_model_tp_plan` names a style for each layer.

colwise splits a layer's outputs (heads, MLP width), rowwise the inputs of the layer behind it, which ends in one
all-reduce; embeddings and head are split by vocabulary, and so is the loss (`engine/vocab_parallel.py`). Megatron-LM,
arXiv 1909.08053.

LoRA follows its layer: W' = W + B A splits B with the outputs of a colwise W, A with the inputs of a rowwise one.
"""

from __future__ import annotations

import re

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError

_FIELD = "compute.parallel.tensor"
_SPLITS_OUTPUTS = ("colwise", "colwise_gather_output")


def _style(name: str, model: PreTrainedModel) -> ParallelStyle:
    """torch's style of that name.

    Raises:
        ConfigError: one that is not here (experts, packed weights), by name.
    """
    styles = {
        "colwise": ColwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise": RowwiseParallel(),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        # a norm over the size of each head: every rank has its own heads, so the weight's gradient is a sum over ranks
        "replicated_with_grad_allreduce": SequenceParallel(use_local_output=True),
    }
    if name not in styles:
        raise ConfigError(
            f"{type(model).__name__} asks for tensor parallelism of the kind {name}, which is not implemented",
            "set compute.parallel.tensor to 1 and shard the model",
            field=_FIELD,
        )
    return styles[name]


def split_layers(model: PreTrainedModel, ranks: DeviceMesh, home: torch.device) -> None:
    """Split every layer that the model's plan names, its embedding and its head over the ranks, in place.

    Raises:
        ConfigError: no plan, a kind of layer or a size that cannot be split exactly, by name.
    """
    plan = getattr(model.base_model.config, "base_model_tp_plan", None)
    if not plan:
        raise ConfigError(
            f"{type(model).__name__} has no plan for tensor parallelism",
            "set compute.parallel.tensor to 1",
            field=_FIELD,
        )
    _check_heads(model, ranks.size())
    for name, module in list(model.base_model.named_modules()):
        kind = plan.get(re.sub(r"\.\d+\.", ".*.", name))
        if kind is not None:
            _split(name, module.to(home), kind, model, ranks)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    base = head.get_base_layer() if isinstance(head, LoraLayer) else head
    tied = base.weight is embedding.weight
    if isinstance(embedding, nn.Embedding):
        parallelize_module(embedding.to(home), ranks, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    _split("the head", head.to(home), "colwise_gather_output", model, ranks)
    if tied:
        base.weight = embedding.weight


def _check_heads(model: PreTrainedModel, ranks: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if count is not None and count % ranks:
            raise ConfigError(f"{name} is {count}, which {ranks} ranks do not divide", "use fewer ranks", field=_FIELD)


def _split(name: str, module: nn.Module, kind: str, model: PreTrainedModel, ranks: DeviceMesh) -> None:
    style = _style(kind, model)
    if isinstance(style, SequenceParallel):
        trained = {key: p.requires_grad for key, p in module.named_parameters()}
        parallelize_module(module, ranks, style, src_data_rank=None)
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(trained[key])  # torch makes new ones that all train
        return
    layers = [module]
    if isinstance(module, LoraLinear):
        factors = module.lora_B if kind in _SPLITS_OUTPUTS else module.lora_A
        layers = [module.get_base_layer(), *factors.values()]
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise ConfigError(
                f"{name} is a {type(layer).__name__}, which cannot be split", "use plain layers", field=_FIELD
            )
        size = layer.out_features if kind in _SPLITS_OUTPUTS else layer.in_features
        if size % ranks.size() and kind in ("colwise", "rowwise"):
            raise ConfigError(
                f"{name} has width {size}, which {ranks.size()} ranks do not divide", "use fewer ranks", field=_FIELD
            )
        parallelize_module(layer, ranks, style, src_data_rank=None)
