"""pair_loss in plain torch, pair by pair: the definition that every backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from macpo.kernels.linear_logp.op import LoraLike
from macpo.kernels.linear_logp.reference import linear_logp
from macpo.kernels.pair_loss.losses import LOSSES, LossSettings, PairScores


def pair_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, cu_rows: Tensor, ref_logps: Tensor | None = None, *,
    loss: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0, gamma: float | None = None,
    ld_alpha: float | None = None, sft_weight: float = 0.0, num_pairs: int | None = None, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, lora: LoraLike | None = None,
) -> Tensor:  # fmt: skip
    """The scalar loss of `op.pair_loss`, differentiable by autograd; a Python loop over pairs."""
    settings = LossSettings(loss, beta, label_smoothing, gamma, ld_alpha, sft_weight)
    logp = linear_logp(hidden, weight, target, bias=bias, logit_scale=logit_scale, softcap=softcap, lora=lora)
    bounds = cu_rows.tolist()
    sequences = [logp[a:b] for a, b in pairwise(bounds)]
    total = logp.new_zeros(())
    for pair, (chosen, rejected) in enumerate(zip(sequences[::2], sequences[1::2], strict=True)):
        ref = logp.new_zeros(2) if ref_logps is None else ref_logps[2 * pair : 2 * pair + 2].to(logp.dtype)
        shared, alpha = min(len(chosen), len(rejected)), 1.0 if ld_alpha is None else ld_alpha
        sums = [part[:shared].sum() + alpha * part[shared:].sum() for part in (chosen, rejected)]
        scores = PairScores(
            chosen=(sums[0] - ref[0])[None],
            rejected=(sums[1] - ref[1])[None],
            chosen_tokens=torch.tensor([float(chosen.numel())]),
            rejected_tokens=torch.tensor([float(rejected.numel())]),
        )
        total = total + LOSSES[loss](scores, settings)[0].squeeze() - sft_weight * chosen.mean()
    return total / (num_pairs or len(sequences) // 2)
