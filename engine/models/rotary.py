"""Rotary embeddings that look at the length of the row: in a packed row, each sequence gets what it would get alone.

LongRoPE (arXiv 2402.13753; Phi-3, Phi-4) has short and long factors, and transformers chooses between them by the
largest position of its input. A packed row or a batch holds sequences of many lengths, so here the model's own rotary
embedding is computed for both kinds, and each token takes the one of its own sequence. Dynamic NTK scaling, too, looks
at the row, but only beyond `max_position_embeddings`, where the engine refuses a sequence of any model and the drop-ins
one of such a model (`check_length`).

T tokens of a row, D rotated size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError, DataError
from macpo.kernels import Segments

LONG, DYNAMIC = "longrope", "dynamic"


def switch_length(model: PreTrainedModel) -> int | None:
    """Return the most tokens of a sequence that gets LongRoPE's short factors; None for a model without them.

    Raises:
        ConfigError: layers that switch at different lengths.
    """
    found = {kind["original_max_position_embeddings"] for kind in _kinds(model) if kind.get("rope_type") == LONG}
    if len(found) > 1:
        text = f"{type(model).__name__} switches its rotary factors at {sorted(found)} tokens, by layer"
        raise ConfigError(text, "use a model whose layers switch at one length")
    return int(found.pop()) if found else None


def check_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Raise DataError where sequences of this many tokens would change the rotary factors of others in their row."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens > limit and any(kind.get("rope_type") == DYNAMIC for kind in _kinds(model)):
        text = f"a sequence has {num_tokens} tokens, and beyond {limit} dynamic rotary factors depend on the longest"
        raise DataError(f"{text} sequence of a batch", f"cut prompts and responses to {limit} tokens")


@contextmanager
def rotary_per_sequence(model: PreTrainedModel) -> Iterator[None]:
    """Make the rotary embeddings of forwards that get an `attention_context` choose by sequence, not by row."""
    limit = switch_length(model)
    modules = [] if limit is None else [module for module in model.modules() if _switches(module)]
    if limit is None or not modules:
        yield
        return
    forward: dict[str, Any] = {}  # the attention context of the running forward

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        forward["context"] = kwargs.get("attention_context")

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    before = [(module, vars(module).get("forward")) for module in modules]
    for module in modules:
        vars(module)["forward"] = _by_sequence(module.forward, limit, forward)
    try:
        yield
    finally:
        handle.remove()
        for module, own in before:
            vars(module).pop("forward")
            if own is not None:
                vars(module)["forward"] = own


def sequence_lengths(segments: Segments | None, positions: Tensor) -> Tensor:
    """Return how long each token's sequence is, [T] int64: its largest position + 1.

    Args:
        segments: of the row; None in a decode step, in which every token is the last of its own sequence.
        positions: [T] int64.

    A shared prompt counts as the longest of its sequences (`engine.data.pack.unshared` gives it two copies where that
    matters).
    """
    if segments is None:
        return positions + 1
    start, group = segments.segment_start.long(), segments.prefix_start.long()
    last = [torch.zeros_like(positions).scatter_reduce_(0, by, positions, "amax")[by] for by in (start, group)]
    is_prompt = segments.prefix_end == segments.prefix_start
    return torch.where(is_prompt, last[1], last[0]) + 1


def _kinds(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The rotary parameters of the config: one set for all layers, or one for each type of layer."""
    own = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [value for value in own.values() if isinstance(value, dict)] or [own]


def _switches(module: nn.Module) -> bool:
    kinds: Any = getattr(module, "rope_type", None)
    return LONG in (kinds.values() if isinstance(kinds, dict) else (kinds,))


def _by_sequence(own: Callable[..., Any], limit: int, forward: dict[str, Any]) -> Callable[..., Any]:
    """Wraps a rotary embedding's own forward, which reads the largest of the position ids [B, T] that it gets."""

    def chosen(x: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        context = forward.get("context")
        if context is None:
            return own(x, position_ids, **rest)
        lengths = sequence_lengths(getattr(context, "segments", None), position_ids.flatten())
        is_long = (lengths > limit).view_as(position_ids)
        short = own(x, position_ids.masked_fill(is_long, 0), **rest)
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), limit)  # one more token, the first beyond
        long = own(x, torch.cat([position_ids.masked_fill(~is_long, 0), beyond], -1), **rest)
        if isinstance(short, Tensor):
            return _either(is_long, long, short)
        return tuple(_either(is_long, a, b) for a, b in zip(long, short, strict=True))

    return chosen


def _either(is_long: Tensor, long: Tensor, short: Tensor) -> Tensor:
    """is_long [B, T], long [B, T + 1, D], short [B, T, D] -> [B, T, D]."""
    return torch.where(is_long[..., None], long[..., :-1, :], short)
