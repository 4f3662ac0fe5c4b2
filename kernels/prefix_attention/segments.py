"""Describes which keys each token of a packed row may see: three integers per token, and the groups' borders.

A group is one prompt and its responses: `prompt, response_1, ..., response_n`. Groups never see each other.
Legend: t tokens of the packed row, g groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Segments:
    """Attention metadata of one packed row; immutable by convention, because masks made from it are cached on it.

    Query token i sees the keys `[prefix_start[i], min(prefix_end[i], i + 1))` and `[segment_start[i], i]`.
    A prompt token has an empty prefix (`prefix_end == prefix_start`) and its group's offset as segment_start.
    """

    prefix_start: Tensor
    """int32 [T]: first key of the shared prompt."""
    prefix_end: Tensor
    """int32 [T]: one past the last key of the shared prompt."""
    segment_start: Tensor
    """int32 [T]: first token of the run (prompt or response) that the token belongs to."""
    cu_groups: tuple[int, ...] | None = None
    """Token offsets of the groups, from 0 to T; None when the whole row is one group."""
    plans: dict[tuple[int | None, int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )
    """The Triton kernels' plans by (window, head size, dtype); see `op.plan_attention`."""
    _cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        num_tokens = self.prefix_start.numel()
        for name in ("prefix_start", "prefix_end", "segment_start"):
            value = getattr(self, name)
            if value.dtype != torch.int32 or value.shape != (num_tokens,):
                raise ValueError(f"Segments.{name} must be int32 [{num_tokens}], got {value.dtype} {list(value.shape)}")
        if self.cu_groups is not None:
            cu = self.cu_groups
            increasing = all(a < b for a, b in pairwise(cu))
            if len(cu) < 2 or cu[0] != 0 or cu[-1] != num_tokens or not increasing:
                raise ValueError(f"Segments.cu_groups must grow from 0 to {num_tokens}, got {cu}")

    @classmethod
    def from_lengths(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Segments:
        """Segments of groups given as (prompt tokens, [tokens of each response])."""
        prefix_start: list[int] = []
        prefix_end: list[int] = []
        segment_start: list[int] = []
        cu = [0]
        for prompt, responses in groups:
            start = cu[-1]
            prefix_start += [start] * (prompt + sum(responses))
            prefix_end += [start] * prompt + [start + prompt] * sum(responses)
            segment_start += [start] * prompt
            at = start + prompt
            for length in responses:
                segment_start += [at] * length
                at += length
            cu.append(at)
        prefix_start_t, prefix_end_t, segment_start_t = (
            torch.tensor(values, dtype=torch.int32) for values in (prefix_start, prefix_end, segment_start)
        )
        return cls(prefix_start_t, prefix_end_t, segment_start_t, tuple(cu))

    @property
    def num_tokens(self) -> int:
        return self.prefix_start.numel()

    @property
    def bounds(self) -> tuple[int, ...]:
        """Token offsets of the groups, one group when none were given."""
        return self.cu_groups or (0, self.num_tokens)

    def positions(self) -> Tensor:
        """int64 [T]: position of each token in its own sequence (prompt + its response)."""
        index = torch.arange(self.num_tokens, device=self.prefix_start.device)
        return (self.prefix_end - self.prefix_start).long() + index - self.segment_start

    def to(self, device: torch.device | str) -> Segments:
        """The same segments on `device` (itself when already there)."""
        if self.prefix_start.device == torch.device(device):
            return self
        return Segments(
            self.prefix_start.to(device), self.prefix_end.to(device), self.segment_start.to(device), self.cu_groups
        )

    def cached(self, key: Hashable, make: Any) -> Any:
        """`make()`, computed once for each key; layers of a model ask for the same mask."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def visible(segments: Segments, start: int, stop: int, window: int | None) -> Tensor:
    """bool [stop - start, stop - start]: may query i (row) see key j (column), for tokens of `[start, stop)`.

    `window` counts positions of a token's own sequence, itself included (Hugging Face's `sliding_window`).
    """
    token = torch.arange(start, stop, device=segments.prefix_start.device)
    query, key = token[:, None], token[None, :]
    prefix_start, prefix_end, segment_start = (
        value[start:stop, None].long() for value in (segments.prefix_start, segments.prefix_end, segments.segment_start)
    )
    mask = ((key >= prefix_start) & (key < prefix_end) & (key <= query)) | ((key >= segment_start) & (key <= query))
    if window is not None:
        position = segments.positions()[start:stop]
        mask &= position[:, None] - position[None, :] < window
    return mask
