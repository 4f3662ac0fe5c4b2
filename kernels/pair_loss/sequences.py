"""Sums over the rows of a sequence, and the weight of each response token.

Legend: n rows, s sequences (two a pair).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from macpo.kernels.transfer import to_device


def sequence_sums(logp_n: Tensor, cu_rows: Tensor, *, ld_alpha: float | None = None) -> Tensor:
    """Sums of consecutive runs of rows: [N] float, cu_rows [S + 1] int32 on the CPU -> [S], dtype of logp_n.

    Summed in float64 and rounded once, so that a sequence's sum does not depend on what is batched with it.

    Args:
        logp_n: log-probs of the rows.
        cu_rows: where each sequence's rows begin.
        ld_alpha: weigh rows as LD-DPO does (`row_weights`), for the reference log-probs of a `pair_loss` with the
            same ld_alpha; the sequences are then c0, r0, c1, r1, ...

    Raises:
        ValueError: ld_alpha with an odd number of sequences.
    """
    bounds = cu_rows.tolist()
    if ld_alpha is not None:
        if len(bounds) % 2 == 0:
            raise ValueError(f"ld_alpha compares the two responses of a pair, got {len(bounds) - 1} sequences")
        logp_n = logp_n * to_device(row_weights(bounds, ld_alpha), logp_n.device).to(logp_n.dtype)
    return segment_sums(logp_n, to_device(torch.tensor(bounds).diff(), logp_n.device))


def segment_sums(x_n: Tensor, lengths_s: Tensor) -> Tensor:
    """Sums of runs of `lengths_s` rows, by float64, in x's dtype."""
    return torch.segment_reduce(x_n.double(), "sum", lengths=lengths_s, unsafe=True).to(x_n.dtype)


def row_weights(bounds: list[int], ld_alpha: float) -> Tensor:
    """LD-DPO's weight of every row, [N] float32 on the CPU: 1 up to the shorter response's length, ld_alpha beyond.

    Section 3 of arXiv 2409.06411, where a token's likelihood is taken to the power ld_alpha; as TRL's `ld_alpha`.
    """
    lengths = [b - a for a, b in pairwise(bounds)]
    weights = torch.ones(bounds[-1])
    for s, length in enumerate(lengths):
        shared = min(length, lengths[s ^ 1])
        weights[bounds[s] + shared : bounds[s + 1]] = ld_alpha
    return weights


def row_sequences(bounds: list[int]) -> Tensor:
    """The sequence that each row belongs to: [N] int64 on the CPU."""
    lengths = torch.tensor(bounds).diff()
    return torch.repeat_interleave(torch.arange(len(bounds) - 1), lengths)
