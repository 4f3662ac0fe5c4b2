"""prefix_attention with torch's scaled_dot_product_attention: groups padded to a common length.

On a CPU `cpu_impl.py` does it with less work, wherever tokens come in runs as `Segments.from_lengths` makes them.

Legend: t packed tokens, b groups of a bucket, l longest group of the bucket, h heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from macpo.kernels.attention_weights import capped, sink_gradient, softmax
from macpo.kernels.prefix_attention import cpu_impl
from macpo.kernels.prefix_attention.segments import Segments


@dataclass(frozen=True)
class _Bucket:
    """Groups of similar length that one attention call handles."""

    tokens: Tensor  # int64 [n]: packed index of every token of the bucket
    slots: Tensor  # int64 [n]: its place in the padded [b * l]
    num_groups: int
    length: int
    full: bool  # no padding: slots are 0 .. n-1
    mask: Tensor  # [b, 1, l, l] additive, the queries' dtype


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]; see `op.prefix_attention`."""
    if q.device.type == "cpu":
        width = q.shape[1] * q.shape[2]
        calls = segments.cached(
            ("cpu", q.dtype, window, width),
            lambda: cpu_impl.make_plan(segments.to("cpu"), window, width, q.dtype),
        )
        if calls is not None:
            return cpu_impl.prefix_attention(q, k, v, calls, scale, softcap, sinks)
    buckets: list[_Bucket] = segments.cached(
        (q.device, q.dtype, window), lambda: _plan(segments.to(q.device), window, q.dtype)
    )
    if len(buckets) == 1:  # its tokens are in packed order
        return _attend(q, k, v, buckets[0], scale, softcap, sinks)
    outputs = []
    for bucket in buckets:
        q_part, k_part, v_part = (x.index_select(0, bucket.tokens) for x in (q, k, v))
        outputs.append(_attend(q_part, k_part, v_part, bucket, scale, softcap, sinks))
    back = segments.cached((q.device, "back"), lambda: torch.cat([b.tokens for b in buckets]).argsort())
    return torch.cat(outputs).index_select(0, back)


def gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, Hq, D], dk and dv [T, Hkv, D] for do [T, Hq, D], without autograd; inside in at least float32.

    The last is the gradient of the sinks [Hq], empty where there are none.

    A compiled graph calls this, because a custom operator cannot differentiate through its own forward.
    """
    scale = q.shape[2] ** -0.5 if scale is None else scale
    buckets = _plan(segments.to(q.device), window, torch.promote_types(q.dtype, torch.float32))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    for bucket in buckets:
        wide = [x.index_select(0, bucket.tokens).to(bucket.mask.dtype) for x in (do, q, k, v)]
        do_bhld, q_bhld, k_bhld, v_bhld = (_padded(x, bucket) for x in wide)
        # Query heads of a key/value head are rows of one product, so that sums over them need no step of their own.
        shape = (bucket.num_groups, k.shape[1], -1, q.shape[2])
        do_bhrd, q_bhrd = (x.reshape(shape) for x in (do_bhld, q_bhld))
        scores = capped(q_bhrd @ k_bhld.mT * scale, softcap)
        masked_bhgll = scores.unflatten(2, (-1, bucket.length)) + bucket.mask[:, :, None]
        sinks_hg11 = None if sinks is None else sinks.view(k.shape[1], -1, 1, 1)
        p_bhrl = softmax(masked_bhgll, sinks_hg11).flatten(2, 3)
        dp_bhrl = do_bhrd @ v_bhld.mT
        delta_bhr1 = (dp_bhrl * p_bhrl).sum(-1, keepdim=True)
        ds_bhrl = p_bhrl * (dp_bhrl - delta_bhr1) * scale
        if softcap is not None:
            ds_bhrl *= 1.0 - (scores / softcap).square()  # tanh' = 1 - tanh^2
        if sinks is not None and sinks_hg11 is not None:
            lse_bhgl = torch.logaddexp(masked_bhgll.logsumexp(-1), sinks_hg11[..., 0])
            delta_hr, lse_hr = (x.reshape(len(x), len(sinks), -1).transpose(0, 1) for x in (delta_bhr1, lse_bhgl))
            dsinks += sink_gradient(delta_hr.flatten(1), lse_hr.flatten(1), sinks)
        parts = ((ds_bhrl @ k_bhld).view_as(q_bhld), ds_bhrl.mT @ q_bhrd, p_bhrl.mT @ do_bhrd)
        for grad, part in zip((dq, dk, dv), parts, strict=True):
            grad.index_copy_(0, bucket.tokens, _packed(part, bucket).to(grad.dtype))
    return dq, dk, dv, dsinks


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bucket: _Bucket, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one bucket's tokens; inputs and result are [n, H, D] in the bucket's token order."""
    q_bhld, k_bhld, v_bhld = _padded(q, bucket), _padded(k, bucket), _padded(v, bucket)
    if k_bhld.shape[1] != q_bhld.shape[1]:
        repeats = q_bhld.shape[1] // k_bhld.shape[1]
        k_bhld, v_bhld = (x.repeat_interleave(repeats, dim=1) for x in (k_bhld, v_bhld))
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(q_bhld, k_bhld, v_bhld, attn_mask=bucket.mask, scale=scale)
        return _packed(out, bucket)
    wide = [x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q_bhld, k_bhld, v_bhld)]
    scores = capped(wide[0] @ wide[1].mT * (q.shape[2] ** -0.5 if scale is None else scale), softcap) + bucket.mask
    out = softmax(scores, None if sinks is None else sinks[:, None, None]) @ wide[2]
    return _packed(out.to(q.dtype), bucket)


def _padded(x: Tensor, bucket: _Bucket) -> Tensor:
    """[n, H, D] in the bucket's token order -> [b, H, l, D], padding 0."""
    if not bucket.full:
        x = x.new_zeros(bucket.num_groups * bucket.length, *x.shape[1:]).index_copy(0, bucket.slots, x)
    return x.view(bucket.num_groups, bucket.length, *x.shape[1:]).transpose(1, 2)


def _packed(x_bhld: Tensor, bucket: _Bucket) -> Tensor:
    """The inverse of `_padded`."""
    x = x_bhld.transpose(1, 2).flatten(0, 1)
    return x if bucket.full else x.index_select(0, bucket.slots)


def _plan(segments: Segments, window: int | None, dtype: torch.dtype) -> list[_Bucket]:
    """Buckets in which no group is shorter than half the longest, so that padding stays below 4x of the work."""
    bounds = segments.bounds
    spans = list(pairwise(bounds))
    spans.sort(key=lambda span: (span[0] - span[1], span[0]))  # longest first, then in packed order
    split: list[list[tuple[int, int]]] = []
    for span in spans:
        longest = split[-1][0] if split else None
        if longest is None or (span[1] - span[0]) * 2 < longest[1] - longest[0]:
            split.append([])
        split[-1].append(span)
    if len(split) == 1:
        split[0].sort()  # one bucket keeps the packed order, so that nothing has to be gathered
    return [_bucket(segments, part, window, dtype) for part in split]


def _bucket(segments: Segments, spans: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> _Bucket:
    """The rule of `segments.visible` for all groups of a bucket at once; a padding query sees itself alone."""
    device = segments.prefix_start.device
    start_b1 = torch.tensor([start for start, _ in spans], device=device)[:, None]
    size_b1 = torch.tensor([stop - start for start, stop in spans], device=device)[:, None]
    length = max(stop - start for start, stop in spans)
    place_l = torch.arange(length, device=device)
    real_bl = place_l < size_b1
    index_bl = (start_b1 + place_l).clamp_max(segments.num_tokens - 1)

    def local(mark_t: Tensor, padding: Tensor) -> Tensor:
        """A mark of every token, counted from its group's start: [b, l, 1]."""
        return torch.where(real_bl, mark_t[index_bl] - start_b1, padding)[:, :, None]

    never = torch.zeros_like(place_l)
    in_prefix = (place_l >= local(segments.prefix_start, never)) & (place_l < local(segments.prefix_end, never))
    allowed = (place_l <= place_l[:, None]) & (in_prefix | (place_l >= local(segments.segment_start, place_l)))
    if window is not None:
        position_bl = torch.where(real_bl, segments.positions()[index_bl], 0)
        allowed &= position_bl[:, :, None] - position_bl[:, None, :] < window
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))
    tokens = index_bl[real_bl]
    slots = real_bl.flatten().nonzero()[:, 0]
    return _Bucket(tokens, slots, len(spans), length, tokens.numel() == len(spans) * length, mask[:, None])
