"""prefix_attention on a CPU: torch's flash kernel over runs of tokens that share their keys, without wasted scores.

A prompt with its first response is plain causal text: one call, no mask, nothing copied. Each further response is a
run of queries over [prompt, own tokens]. Runs are padded into one call only where that costs less than a call more.
16-bit inputs are computed in float32, which the kernel does faster and more exactly. Sinks are added to each call's
result; a softcap, which the flash kernel lacks, makes `cpu_softcap` run the calls.

Legend: t packed tokens, b runs of a call, q queries and k keys of its longest run, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from macpo.kernels.attention_weights import sink_gradient, with_sink
from macpo.kernels.prefix_attention import cpu_softcap
from macpo.kernels.prefix_attention.segments import Segments

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # do, q, k, v, o, lse
_CALL_WORK = 2**18  # scores times width (heads * head size) that take about as long as one call more


class _Run(NamedTuple):
    """Tokens `[start, stop)` that see the keys `[lo, hi)` and their own run up to themselves; hi <= start."""

    lo: int
    hi: int
    start: int
    stop: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.hi - self.lo + self.queries


@dataclass(frozen=True)
class _One:
    """The rows of one run: slices of the packed tensors."""

    ranges: tuple[tuple[int, int], ...]

    def take(self, x: Tensor, *, zero: bool = False) -> Tensor:
        """[t, H, D] -> [1, H, l, D]."""
        parts = [x[start:stop] for start, stop in self.ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None].transpose(1, 2)

    def put(self, x: Tensor, part_bhld: Tensor, *, add: bool) -> None:
        rows = part_bhld[0].transpose(0, 1)
        at = 0
        for start, stop in self.ranges:
            new = rows[at : at + stop - start]
            x[start:stop].add_(new) if add else x[start:stop].copy_(new)
            at += stop - start


@dataclass(frozen=True)
class _Many:
    """The rows of several runs, padded to one length; no token is twice among them."""

    tokens: Tensor  # int64 [n]: packed index of every row
    slots: Tensor  # int64 [n]: its place in the padded [b * l]
    padded: Tensor  # int64 [b * l]: packed index of every place, at padding the run's first token
    padding: Tensor  # int64 [b * l - n]: places without a row
    runs: int

    def take(self, x: Tensor, *, zero: bool = False) -> Tensor:
        """Padding holds copies of a row, or zeros: a query whose gradient is zero adds nothing to any other."""
        rows = x.index_select(0, self.padded)
        if zero and len(self.padding):
            rows.index_fill_(0, self.padding, 0.0)
        return rows.view(self.runs, -1, *x.shape[1:]).transpose(1, 2)

    def put(self, x: Tensor, part_bhld: Tensor, *, add: bool) -> None:
        rows = part_bhld.transpose(1, 2).flatten(0, 1)
        if len(self.padding):
            rows = rows.index_select(0, self.slots)
        x.index_copy_(0, self.tokens, rows + x.index_select(0, self.tokens) if add else rows)


@dataclass(frozen=True)
class _Call:
    """One call of the kernel."""

    queries: _One | _Many
    keys: _One | _Many
    mask: Tensor | None  # additive, [b, 1, q, k]; None is causal
    add: bool  # whether keys of an earlier call are among its keys

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """o [b, h, q, d] and the logarithm of each query's sum of exponentials [b, h, q]."""
        if softcap is not None:
            return cpu_softcap.forward(q, k, v, self.mask, _scale(q, scale), softcap)
        o, lse = _FLASH(q, k, v, 0.0, self.mask is None, attn_mask=self.mask, scale=scale)
        return o, lse

    def backward(self, inputs: _Inputs, scale: float | None, softcap: float | None) -> tuple[Tensor, ...]:
        """dq, dk, dv."""
        if softcap is not None:
            return cpu_softcap.backward(*inputs, self.mask, _scale(inputs[1], scale), softcap)
        grads: tuple[Tensor, ...] = _FLASH_BACKWARD(*inputs, 0.0, self.mask is None, attn_mask=self.mask, scale=scale)
        return grads


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, calls: list[_Call], scale: float | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]; `calls` are `make_plan`'s."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Tensor = _Attention.apply(q, k, v, sinks, calls, (scale, softcap))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, calls: list[_Call],
        form: tuple[float | None, float | None],
    ) -> Tensor:  # fmt: skip
        wide = _wide(q.dtype)
        q_thd, k_thd, v_thd = (x.to(wide) for x in (q, k, v))
        o_thd = torch.empty_like(q_thd, memory_format=torch.contiguous_format)
        lses = []
        for call in calls:
            inputs = call.queries.take(q_thd), call.keys.take(k_thd), call.keys.take(v_thd)
            o_bhqd, lse = call.forward(*inputs, *form)
            if sinks is not None:
                o_bhqd, lse = with_sink(o_bhqd, lse, sinks[:, None])
            call.queries.put(o_thd, o_bhqd, add=False)
            lses.append(lse)
        ctx.save_for_backward(q, k, v, sinks, o_thd, *lses)
        ctx.calls, ctx.form = calls, form
        return o_thd.to(q.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, o_thd, *lses = ctx.saved_tensors
        q_thd, k_thd, v_thd, do_thd = (x.to(o_thd.dtype) for x in (q, k, v, do))
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_thd, k_thd, v_thd)]
        dsinks = torch.zeros_like(sinks) if ctx.needs_input_grad[3] else None
        for call, lse in zip(ctx.calls, lses, strict=True):
            rows, keys = call.queries, call.keys
            inputs = (
                rows.take(do_thd, zero=True),
                rows.take(q_thd),
                keys.take(k_thd),
                keys.take(v_thd),
                rows.take(o_thd),
                lse,
            )
            parts = call.backward(inputs, *ctx.form)
            if dsinks is not None:
                delta_hbq = (inputs[0] * inputs[4]).sum(-1).transpose(0, 1)
                dsinks += sink_gradient(delta_hbq.flatten(1), lse.transpose(0, 1).flatten(1), sinks)
            rows.put(grads[0], parts[0], add=False)
            keys.put(grads[1], parts[1], add=call.add)
            keys.put(grads[2], parts[2], add=call.add)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return dq, dk, dv, dsinks, None, None


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make_plan(segments: Segments, window: int | None, width: int, dtype: torch.dtype) -> list[_Call] | None:
    """The calls for q of `width` = heads * head size; None where tokens do not come in runs of the packed kind.

    Causal runs come first and cover every token of theirs, so that only later calls add to gradients of keys.
    """
    runs = _runs(segments)
    if runs is None:
        return None
    lead: list[_Run] = []
    later: dict[int, list[_Run]] = {}  # by how many runs before had the same prefix: no key twice in a call
    seen: dict[int, int] = {}
    for run in runs:
        if run.lo == run.hi:
            lead.append(run)
        elif lead and run.lo == lead[-1].start and run.hi == lead[-1].stop == run.start and run.lo not in seen:
            lead[-1] = _Run(run.lo, run.lo, run.lo, run.stop)
            seen[run.lo] = 0
        else:
            seen[run.lo] = seen.get(run.lo, 0) + 1
            later.setdefault(seen[run.lo], []).append(run)
    calls = [_call(part, window, dtype, causal=True) for part in _batches(lead, width)]
    for level in sorted(later):
        calls += [_call(part, window, dtype, causal=False) for part in _batches(later[level], width)]
    return calls


def _runs(segments: Segments) -> list[_Run] | None:
    """Consecutive tokens of one prefix and one start; None where a run does not begin at its own first token, or sees
    a prefix that it is part of or that overlaps another one."""
    marks = torch.stack((segments.prefix_start, segments.prefix_end, segments.segment_start))
    starts = [0, *((marks[:, 1:] != marks[:, :-1]).any(0).nonzero()[:, 0] + 1).tolist()]
    runs = []
    for (start, stop), (lo, hi, own) in zip(
        pairwise([*starts, segments.num_tokens]), marks[:, starts].T.tolist(), strict=True
    ):
        if own != start or hi > max(lo, start):
            return None
        runs.append(_Run(lo, hi, start, stop) if hi > lo else _Run(start, start, start, stop))
    prefixes = sorted({(run.lo, run.hi) for run in runs if run.hi > run.lo})
    return None if any(a[1] > b[0] for a, b in pairwise(prefixes)) else runs


def _batches(runs: Sequence[_Run], width: int) -> list[list[_Run]]:
    """Longest first; a run joins the last batch while padding costs less than the calls that are saved."""
    batches: list[list[_Run]] = []
    longest = scores = 0
    for run in sorted(runs, key=lambda run: (-run.keys, -run.queries, run.start)):
        longest, scores = max(longest, run.queries), scores + run.keys * run.queries
        if batches:
            size = len(batches[-1]) + 1
            if (size * batches[-1][0].keys * longest - scores) * width <= _CALL_WORK * (size - 1):
                batches[-1].append(run)
                continue
        batches.append([run])
        longest, scores = run.queries, run.keys * run.queries
    return batches


def _call(runs: list[_Run], window: int | None, dtype: torch.dtype, *, causal: bool) -> _Call:
    num_queries, num_keys = (max(sizes) for sizes in zip(*((r.queries, r.keys) for r in runs), strict=True))
    own = [((run.start, run.stop),) for run in runs]
    seen = own if causal else [((run.lo, run.hi), (run.start, run.stop)) for run in runs]
    mask = None
    if not causal or (window is not None and window < num_keys):
        prompt_b11 = torch.tensor([0 if causal else run.hi - run.lo for run in runs])[:, None, None]
        # a padding query sees what the last one sees, so that it has a key
        last_bq1 = (prompt_b11 + torch.arange(num_queries)[:, None]).clamp_max(num_keys - 1)
        key_k = torch.arange(num_keys)
        hidden = key_k > last_bq1
        if window is not None:
            hidden |= key_k <= last_bq1 - window
        mask = torch.zeros(hidden.shape, dtype=_wide(dtype)).masked_fill_(hidden, float("-inf"))[:, None]
    return _Call(_rows(own, num_queries), _rows(seen, num_keys), mask, add=not causal)


def _rows(ranges: Sequence[tuple[tuple[int, int], ...]], length: int) -> _One | _Many:
    if len(ranges) == 1:
        return _One(ranges[0])
    starts, sizes = (
        torch.tensor(values)
        for values in zip(*((start, stop - start) for each in ranges for start, stop in each), strict=True)
    )
    row = torch.arange(int(sizes.sum()))
    tokens = row + (starts - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
    of_run = sizes.view(len(ranges), -1).sum(1)
    slots = row + (torch.arange(len(ranges)) * length - of_run.cumsum(0) + of_run).repeat_interleave(of_run)
    is_padding = torch.ones(len(ranges) * length, dtype=torch.bool).index_fill_(0, slots, False)
    first = starts.view(len(ranges), -1)[:, 0]  # a run's padding is its own, so that no run's NaN reaches another
    padded = first.repeat_interleave(length).index_copy_(0, slots, tokens)
    return _Many(tokens, slots, padded, is_padding.nonzero()[:, 0], len(ranges))
