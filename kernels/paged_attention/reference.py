"""paged_attention as a loop over sequences: the definition that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.attention_weights import capped, softmax


def paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, context_lens: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query token a sequence against its paged keys and values; see `op.paged_attention`."""
    block_tokens, num_kv_heads, head_dim = k_pool.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    repeats = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    for row, length in enumerate(context_lens.tolist()):
        token = torch.arange(0 if window is None else max(0, length - window), length, device=q.device)
        block = block_table[row, token // block_tokens].long()
        k, v = (pool[block, token % block_tokens].repeat_interleave(repeats, dim=1) for pool in (k_pool, v_pool))
        scores_hk = capped(torch.einsum("hd,khd->hk", q[row], k) * scale, softcap)
        probs_hk = softmax(scores_hk, None if sinks is None else sinks[:, None])
        out[row] = torch.einsum("hk,khd->hd", probs_hk, v)
    return out
