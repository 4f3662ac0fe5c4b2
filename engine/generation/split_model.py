"""Splits a model that no GPU can hold alone over a tensor-parallel group, whose ranks generate in lockstep.

The model's own plan says which layers are split by outputs and which by inputs (`engine/models/tensor_parallel.py`).
Training splits into DTensors; here a rank keeps plain tensors, so packed weights, fused LoRA and stacked adapters run
as on a whole model, and hooks combine what crosses ranks.

LoRA follows its layer: B is split with the outputs, A with the inputs. Vocabularies are split into equal parts, the
last one padded with rows of zeros that are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from macpo.engine.distributed.world import World, team_of
from macpo.engine.errors import ConfigError, ResourceError
from macpo.engine.generation.multilora import why_not
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tensor_parallel import FIELD, head_counts, layers_with_sinks, linear_parts, planned_layers


def team_size(policy: PolicyModule, fits: Callable[[int], bool], world: World) -> int:
    """The smallest tensor-parallel group that can hold the model: a divisor of the ranks and of the model's heads.

    Args:
        fits: whether a rank's part fits, given the number of ranks that share the model.

    Raises:
        ResourceError: not even all ranks together can hold it.
    """
    counts = head_counts(policy.base)
    sizes = [n for n in range(1, world.size + 1) if not world.size % n and not any(c % n for c in counts.values())]
    for size in sizes:
        if fits(size):
            return size
    heads = " and ".join(f"{count} {name}" for name, count in counts.items())
    raise ResourceError(
        f"no rank can hold the base model, nor its part where {sizes[-1]} of {world.size} ranks split it ({heads})",
        "raise compute.memory_gb, use more ranks, or a smaller model or dtype",
        field="compute.memory_gb",
    )


@torch.no_grad()
def split_policy(policy: PolicyModule, world: World, size: int) -> PolicyModule:
    """Split a frozen policy over tensor-parallel groups of `size` ranks, in place; all ranks of the world call it.

    Each rank moves its part to `policy.home`. The weights may be anywhere; of a base that is mapped from its files, a
    rank reads only the part that it keeps. From then on the group `policy.team` runs each forward together, on the same
    tokens.

    Raises:
        ConfigError: no plan, or a layer or size that cannot be split; the error names it.
    """
    if size == 1:
        return policy.to(policy.home)
    team, model = team_of(world, size), policy.base
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    reason = why_not(policy.model) if isinstance(policy.model, PeftModel) else ""
    if reason or not isinstance(embedding, nn.Embedding):
        what = reason or f"its embedding is a {type(embedding).__name__}"
        raise ConfigError(f"{type(model).__name__} cannot be split: {what}", "use plain layers and LoRA", field=FIELD)
    base, *_ = linear_parts("the head", head)
    tied = base.weight is embedding.weight
    for name, module, kind in [*planned_layers(model, size), ("the head", head, "colwise_gather_output")]:
        _split_linear(name, module, kind, team)
    for layer in layers_with_sinks(model):
        layer.sinks = _parameter(_part(layer.sinks, 0, team))
    embedding.weight = base.weight if tied else _parameter(_part(embedding.weight, 0, team))
    start = team.rank * embedding.weight.shape[0]
    vars(embedding)["forward"] = partial(_embed, embedding, start, team)
    policy.to(policy.home)
    policy.team = team
    return policy


def _split_linear(name: str, module: nn.Module, kind: str, team: World) -> None:
    """Splits one linear layer with its LoRA and registers the hooks that combine its ranks' results."""
    if kind == "replicated_with_grad_allreduce":  # a norm over the head size: every rank has its own heads
        return
    base, a, b = linear_parts(name, module)
    by_outputs = kind in ("colwise", "colwise_gather_output")
    whole = base.out_features if by_outputs else base.in_features
    if whole % team.size and kind != "colwise_gather_output":
        fix = "use fewer ranks"
        raise ConfigError(f"{name} has width {whole}, which {team.size} ranks do not divide", fix, field=FIELD)
    dim = 0 if by_outputs else 1
    for layer in [base, *(b if by_outputs else a)]:
        layer.weight = _parameter(_part(layer.weight, dim, team))
    if base.bias is not None:
        bias = _part(base.bias, 0, team) if by_outputs else base.bias * (team.rank == 0)  # added once
        base.bias = _parameter(bias)
    if kind == "colwise_gather_output":
        module.register_forward_hook(partial(_gather, team, whole))
    elif not by_outputs:
        module.register_forward_hook(lambda module, args, y: _total(y, team))
    if kind == "rowwise_split_input":
        module.register_forward_pre_hook(partial(_own_inputs, team))


def _part(weight: Tensor, dim: int, team: World) -> Tensor:
    """Copies this rank's share of equal parts along a dimension, padded with zeros."""
    rows = -(-weight.shape[dim] // team.size)
    start = min(team.rank * rows, weight.shape[dim])
    found = weight.detach().narrow(dim, start, min(rows, weight.shape[dim] - start))
    part = weight.new_zeros(*(rows if d == dim else n for d, n in enumerate(weight.shape)))
    part.narrow(dim, 0, found.shape[dim]).copy_(found)
    return part


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _total(y: Tensor, team: World) -> Tensor:
    """Sums over the group: 16-bit numbers are added in float32 and rounded once."""
    return team.sum_(y.to(torch.promote_types(y.dtype, torch.float32)).contiguous()).to(y.dtype)


def _gather(team: World, width: int, module: nn.Module, args: Any, y: Tensor) -> Tensor:
    """Concatenates [..., part] of every rank to [..., width]."""
    return team.stack(y).movedim(0, -2).flatten(-2)[..., :width]


def _own_inputs(team: World, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = args
    return (x.chunk(team.size, -1)[team.rank], *rest)


def _embed(embedding: nn.Embedding, start: int, team: World, ids: Tensor) -> Tensor:
    """Looks up this rank's tokens; the others are zeros in the sum over the group."""
    own = ids - start
    inside = (own >= 0) & (own < embedding.weight.shape[0])
    found: Tensor = type(embedding).forward(embedding, own.where(inside, 0))
    return _total(found.masked_fill(~inside[..., None], 0), team)
