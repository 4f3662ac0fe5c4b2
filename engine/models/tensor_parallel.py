"""Tensor parallelism by the model's own plan: transformers' `base_model_tp_plan` names a style for each layer.

`colwise` splits a layer's outputs (heads, MLP width), `rowwise` the inputs of the layer after it, which ends in one
all-reduce; embeddings and head are split by vocabulary, and so is the loss (`engine/models/vocab_parallel.py`).
Megatron-LM, arXiv 1909.08053.

LoRA follows its layer: W' = W + B A splits B with the outputs of a colwise W, A with the inputs of a rowwise one.
Attention sinks follow their heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.models.head import is_plain

FIELD = "compute.parallel.tensor"
_SPLITS_OUTPUTS = ("colwise", "colwise_gather_output")
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    # a norm over the size of each head: every rank has its own heads, so the weight's gradient is a sum over ranks
    "replicated_with_grad_allreduce": lambda: SequenceParallel(use_local_output=True),
}
"""torch's style for each kind of layer that transformers names."""


def planned_layers(model: PreTrainedModel, ranks: int) -> list[tuple[str, nn.Module, str]]:
    """(name, module, kind) of every layer that the model's plan names, except its embedding.

    Raises:
        ConfigError: no plan, heads that `ranks` does not divide, or an unsupported kind of layer.
    """
    plan = getattr(model.base_model.config, "base_model_tp_plan", None)
    if not plan:
        fix = "set compute.parallel.tensor to 1"
        raise ConfigError(f"{type(model).__name__} has no plan for tensor parallelism", fix, field=FIELD)
    for name, count in head_counts(model).items():
        if count % ranks:
            raise ConfigError(f"{name} is {count}, which {ranks} ranks do not divide", "use fewer ranks", field=FIELD)
    named = ((name, module, re.sub(r"\.\d+\.", ".*.", name)) for name, module in model.base_model.named_modules())
    embedding = model.get_input_embeddings()  # which transformers 5.17 adds to the plan where the head is tied to it
    layers = [(name, module, plan[key]) for name, module, key in named if key in plan and module is not embedding]
    layers = [
        (name, module, kind) for name, module, kind in layers if not (kind == "local_params" and _sinks_only(module))
    ]
    for kind in (kind for _, _, kind in layers if kind not in _STYLES):  # experts, packed weights
        problem = f"{type(model).__name__} asks for tensor parallelism of the kind {kind}, which is not implemented"
        raise ConfigError(problem, "set compute.parallel.tensor to 1 and shard the model", field=FIELD)
    return layers


def _sinks_only(module: nn.Module) -> bool:
    return [name for name, _ in module.named_parameters(recurse=False)] == ["sinks"]


def layers_with_sinks(model: PreTrainedModel) -> list[Any]:
    """Attention layers that learn a logit for each query head, `sinks` [Hq], which is split as the heads are."""
    return [layer for layer in model.base_model.modules() if isinstance(getattr(layer, "sinks", None), nn.Parameter)]


def head_counts(model: PreTrainedModel) -> dict[str, int]:
    """The numbers of attention heads that the ranks must divide, by config field."""
    config = model.config.get_text_config()
    counts = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: count for name, count in counts.items() if count is not None}


def linear_parts(name: str, module: nn.Module) -> tuple[nn.Linear, list[nn.Linear], list[nn.Linear]]:
    """The plain linear layer, and the factors A and B of its LoRAs.

    Raises:
        ConfigError: the layer, which the message names, is not linear.
    """
    factors: list[list[nn.Module]] = [[], []]
    base = module
    if isinstance(module, LoraLinear):
        if not is_plain(module):
            problem = f"the adapter on {name} is not plain LoRA, and cannot be split"
            raise ConfigError(problem, "set compute.parallel.tensor to 1 and shard the model", field=FIELD)
        base, factors = module.get_base_layer(), [list(module.lora_A.values()), list(module.lora_B.values())]
    for layer in (base, *factors[0], *factors[1]):
        if type(layer) is not nn.Linear:
            fix = "use plain layers"
            raise ConfigError(f"{name} is a {type(layer).__name__}, which cannot be split", fix, field=FIELD)
    a, b = factors
    return base, a, b  # type: ignore[return-value]


def split_layers(model: PreTrainedModel, ranks: DeviceMesh, home: torch.device) -> None:
    """Split every layer that the model's plan names, its embedding and its head over the ranks, in place.

    Raises:
        ConfigError: no plan, or a layer, which the message names, that cannot be split exactly.
    """
    for name, module, kind in planned_layers(model, ranks.size()):
        _split(name, module.to(home), kind, ranks)
    for layer in layers_with_sinks(model):
        own = distribute_tensor(layer.sinks.detach().to(home), ranks, [Shard(0)], src_data_rank=None)
        layer.sinks = nn.Parameter(own, requires_grad=layer.sinks.requires_grad)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    base, *_ = linear_parts("the head", head)
    weight: Any = embedding.weight
    tied = base.weight is weight
    if isinstance(embedding, nn.Embedding):
        parallelize_module(embedding.to(home), ranks, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    _split("the head", head.to(home), "colwise_gather_output", ranks)
    if tied:
        base.weight = embedding.weight  # type: ignore[assignment]


def _split(name: str, module: nn.Module, kind: str, ranks: DeviceMesh) -> None:
    style = _STYLES[kind]()
    if isinstance(style, SequenceParallel):
        trained = {key: p.requires_grad for key, p in module.named_parameters()}
        parallelize_module(module, ranks, style, src_data_rank=None)
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(trained[key])  # torch makes new ones that all train
        return
    base, a, b = linear_parts(name, module)
    for layer in (base, *(b if kind in _SPLITS_OUTPUTS else a)):
        size = layer.out_features if kind in _SPLITS_OUTPUTS else layer.in_features
        if size % ranks.size() and kind in ("colwise", "rowwise"):
            fix = "use fewer ranks"
            raise ConfigError(f"{name} has width {size}, which {ranks.size()} ranks do not divide", fix, field=FIELD)
        parallelize_module(layer, ranks, style, src_data_rank=None)
