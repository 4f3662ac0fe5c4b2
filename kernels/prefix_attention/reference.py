"""prefix_attention as a dense T x T mask: the definition that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.attention_weights import capped, softmax
from macpo.kernels.prefix_attention.segments import Segments, visible


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]; see `op.prefix_attention`. Plain differentiable torch."""
    num_tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    groups = num_heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores_hqk = capped(torch.einsum("qhd,khd->hqk", q, k) * scale, softcap)
    mask = visible(segments, 0, num_tokens, window)
    probs_hqk = softmax(scores_hqk.masked_fill(~mask, float("-inf")), None if sinks is None else sinks[:, None, None])
    return torch.einsum("hqk,khd->qhd", probs_hqk, v)
