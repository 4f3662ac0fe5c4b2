"""pair_loss in plain torch, pair by pair: the definition that every backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from macpo.kernels.linear_logp.reference import linear_logp
from macpo.kernels.pair_loss.losses import LOSSES, PairScores


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_rows: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    num_pairs: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The scalar loss of `op.pair_loss`, differentiable by autograd; a Python loop over pairs."""
    logp = linear_logp(hidden, weight, target, bias=bias, logit_scale=logit_scale, softcap=softcap)
    bounds = cu_rows.tolist()
    sequences = [logp[a:b] for a, b in pairwise(bounds)]
    total = logp.new_zeros(())
    for pair, (chosen, rejected) in enumerate(zip(sequences[::2], sequences[1::2], strict=True)):
        ref = logp.new_zeros(2) if ref_logps is None else ref_logps[2 * pair : 2 * pair + 2].to(logp.dtype)
        scores = PairScores(
            chosen=(chosen.sum() - ref[0])[None],
            rejected=(rejected.sum() - ref[1])[None],
            chosen_tokens=torch.tensor([float(chosen.numel())]),
            rejected_tokens=torch.tensor([float(rejected.numel())]),
        )
        total = total + LOSSES[loss](scores, beta, label_smoothing)[0] - sft_weight * chosen.mean()
    return total / (num_pairs or len(sequences) // 2)
