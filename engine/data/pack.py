"""Prompt groups -> padding-free packed rows: the one data structure of scoring, SFT, DPO and prefill.

    index          0  1  2 | 3  4 | 5  6  7        prompt of 3, two responses of 2 and 3 tokens
    token          p0 p1 p2| c0 c1| r0 r1 r2
    position       0  1  2 | 3  4 | 3  4  5
    prefix         [0,0)   | [0,3)| [0,3)
    segment_start  0  0  0 | 3  3 | 5  5  5
    rows -> target 2->c0 3->c1 | 2->r0 5->r1 6->r2

T tokens of the packed row, R responses, N response tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from macpo.engine.data.groups import PrefixGroup
from macpo.kernels import Segments
from macpo.kernels.transfer import together


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several groups in one row of tokens.

    Attributes:
        input_ids, position_ids: [1, T] int64.
        segments: which tokens each token attends to.
        rows: [N] int64, index of the token whose hidden state predicts the target.
        target: [N] int64 response token ids, in the order of groups and responses.
        cu_rows: [R + 1] int32 on the CPU, offsets of the responses in `rows`.
        last: [R] int64, index of the last token of each response, in the order of groups and responses.
        groups: index of each packed group in the sequence that was given to `pack`.
        max_length: longest prompt with response, in tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    rows: Tensor
    target: Tensor
    cu_rows: Tensor
    last: Tensor
    groups: tuple[int, ...]
    max_length: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device; `cu_rows` stays on the CPU, where chunking is planned."""
        if self.input_ids.device == torch.device(device):
            return self
        own = self.segments
        tensors = (self.input_ids, self.position_ids, self.rows, self.target, self.last)
        segments = (own.prefix_start, own.prefix_end, own.segment_start)
        ids, positions, rows, target, last, start, end, segment = together([*tensors, *segments], torch.device(device))
        return replace(
            self,
            input_ids=ids,
            position_ids=positions,
            rows=rows,
            target=target,
            last=last,
            segments=Segments(start, end, segment, own.cu_groups),
        )


def pack(
    groups: Sequence[PrefixGroup],
    *,
    max_tokens: int,
    order: Literal["ffd", "given"] = "ffd",
    indices: Sequence[int] | None = None,
) -> list[PackedBatch]:
    """Pack groups into rows of at most `max_tokens` tokens.

    Args:
        groups: groups to pack; none is cut, split or dropped, so a group above the budget gets its own row.
        max_tokens: token budget of a row.
        order: "ffd" first-fit decreasing by tokens (ties by index); "given" fills rows in the given order.
        indices: pack only these groups, still named by their index in `groups`.

    Returns:
        Packed rows; a function of the lengths and the budget alone.

    Raises:
        DataError: a group without prompt token or with an empty response.
    """
    return [_build(groups, row) for row in bins(groups, max_tokens=max_tokens, order=order, indices=indices)]


def bins(
    groups: Sequence[PrefixGroup],
    *,
    max_tokens: int,
    order: Literal["ffd", "given"] = "ffd",
    indices: Sequence[int] | None = None,
) -> list[list[int]]:
    """Indices of the groups that `pack` puts into each row."""
    wanted = range(len(groups)) if indices is None else indices
    if order == "ffd":
        wanted = sorted(wanted, key=lambda i: (-groups[i].num_tokens, i))
    found: list[list[int]] = []
    room: list[int] = []
    for i in wanted:
        size = groups[i].num_tokens
        candidates = range(len(found)) if order == "ffd" else range(max(0, len(found) - 1), len(found))
        chosen = next((b for b in candidates if room[b] >= size), None)
        if chosen is None:
            found.append([])
            room.append(max_tokens)
            chosen = len(found) - 1
        found[chosen].append(i)
        room[chosen] -= size
    return found


def unshared(batch: PackedBatch, limit: int | None) -> PackedBatch:
    """Give each prompt two copies whose sequences end on both sides of `limit` tokens, one for each side.

    A model that treats a sequence of more than `limit` tokens differently from its first token on cannot share the
    prompt between the two. Responses, targets and their order stay.
    """
    if limit is None or batch.max_length <= limit:
        return batch
    ids, segments = batch.input_ids[0].tolist(), batch.segments
    ends, starts = segments.prefix_end.tolist(), segments.segment_start.tolist()
    groups = []
    for first, stop in pairwise(segments.bounds):
        runs = [first, *(i for i in range(first + 1, stop) if starts[i] != starts[i - 1]), stop]
        parts = [ids[a:b] for a, b in pairwise(runs)]
        assert ends[stop - 1] == runs[1]
        groups.append(PrefixGroup(parts[0], parts[1:]))
    whole = _build(groups, range(len(groups)), limit)
    return replace(whole, groups=batch.groups).to(batch.input_ids.device)


def _sides(group: PrefixGroup, limit: int | None) -> list[list[int]]:
    """Indices of the responses that share one copy of the prompt."""
    room = max(map(len, group.responses)) if limit is None else limit - len(group.prompt_ids)
    beyond = [len(response) > room for response in group.responses]
    sides = [[i for i, is_beyond in enumerate(beyond) if is_beyond == side] for side in (False, True)]
    return [side for side in sides if side]


def _build(groups: Sequence[PrefixGroup], indices: Sequence[int], limit: int | None = None) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    prefix_start: list[int] = []
    prefix_end: list[int] = []
    segment_start: list[int] = []
    rows: list[int] = []
    target: list[int] = []
    cu_rows = [0]
    last: list[int] = []
    cu_groups = [0]
    for i in indices:
        group = groups[i]
        group.check(f"group {i}")
        num_prompt = len(group.prompt_ids)
        own_rows: list[list[int]] = [[] for _ in group.responses]
        ends = [0] * len(group.responses)
        for side in _sides(group, limit):
            start = len(ids)
            num_response = sum(len(group.responses[r]) for r in side)
            ids += group.prompt_ids
            positions += range(num_prompt)
            prefix_start += [start] * (num_prompt + num_response)
            prefix_end += [start] * num_prompt + [start + num_prompt] * num_response
            segment_start += [start] * num_prompt
            for r in side:
                first, length = len(ids), len(group.responses[r])
                ids += group.responses[r]
                positions += range(num_prompt, num_prompt + length)
                segment_start += [first] * length
                # every response's first token is predicted by the prompt's last row
                own_rows[r] = [start + num_prompt - 1, *range(first, first + length - 1)]
                ends[r] = first + length - 1
            cu_groups.append(len(ids))
        for response, own in zip(group.responses, own_rows, strict=True):
            rows += own
            target += response
            cu_rows.append(len(target))
        last += ends
    segments = Segments(
        prefix_start=_tensor("i", prefix_start),
        prefix_end=_tensor("i", prefix_end),
        segment_start=_tensor("i", segment_start),
        cu_groups=tuple(cu_groups),
    )
    return PackedBatch(
        input_ids=_tensor("q", ids)[None],
        position_ids=_tensor("q", positions)[None],
        segments=segments,
        rows=_tensor("q", rows),
        target=_tensor("q", target),
        cu_rows=_tensor("i", cu_rows),
        last=_tensor("q", last),
        groups=tuple(indices),
        max_length=max(groups[i].max_length for i in indices),
    )


def _tensor(code: Literal["q", "i"], values: list[int]) -> Tensor:
    """An int64 ("q") or int32 ("i") tensor, built several times faster than by torch.tensor."""
    return torch.frombuffer(array(code, values), dtype=torch.int64 if code == "q" else torch.int32)
