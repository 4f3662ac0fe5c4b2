"""Attention with a softcap on a CPU, for which torch's flash kernel has no code: dense products over blocks of queries.

It takes and gives what the flash kernel does (`cpu_impl`), so one call of a plan runs through either.

Legend: b runs, h heads, q queries, k keys, d head size; a block holds the queries `[start, stop)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_SCORES = 2**20  # scores that are held at once: 4 MiB in float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """o [b, h, q, d] and lse [b, h, q] of q [b, h, q, d] and k, v [b, h, k, d].

    mask [b, 1, q, k] is added to the capped scores; None is causal, for as many keys as queries.
    """
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for block, num_keys in _blocks(q, k, mask):
        scores, _ = _capped(q[:, :, block], k[:, :, :num_keys], scale, softcap)
        scores = _masked(scores, mask, block)
        lse[:, :, block] = torch.logsumexp(scores, -1)
        o[:, :, block] = scores.sub_(lse[:, :, block, None]).exp_() @ v[:, :, :num_keys]
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor | None, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv from do and what `forward` took and gave; o and lse may have sinks in their sums."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (do * o).sum(-1)
    for block, num_keys in _blocks(q, k, mask):
        q_part, do_part, keys, values = q[:, :, block], do[:, :, block], k[:, :, :num_keys], v[:, :, :num_keys]
        scores, tanh = _capped(q_part, keys, scale, softcap)
        p = _masked(scores, mask, block).sub_(lse[:, :, block, None]).exp_()
        dv[:, :, :num_keys] += p.mT @ do_part
        ds = (do_part @ values.mT).sub_(delta[:, :, block, None]).mul_(p)
        ds.mul_(tanh.square_().neg_().add_(1.0)).mul_(scale)  # tanh' = 1 - tanh^2
        dq[:, :, block] = ds @ keys
        dk[:, :, :num_keys] += ds.mT @ q_part
    return dq, dk, dv


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many of the keys some query of each may see."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    size = max(16, _BLOCK_SCORES // (q.shape[0] * q.shape[1] * num_keys))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        yield slice(start, stop), stop if mask is None else num_keys


def _capped(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """softcap * tanh(scale * q k' / softcap), and the tanh."""
    tanh = (q @ k.mT).mul_(scale / softcap).tanh_()
    return tanh * softcap, tanh


def _masked(scores: Tensor, mask: Tensor | None, block: slice) -> Tensor:
    if mask is not None:
        return scores.add_(mask[:, :, block])
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu_(block.start + 1)
    return scores.masked_fill_(hidden, float("-inf"))
