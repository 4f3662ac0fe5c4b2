"""pair_loss over linear_logp: log-probs of the rows, their sums, the loss; gradients come back as one scalar a row.

The head's gradient is linear_logp's explicit one (2u frozen, 3u or 4u trained); only [N]-sized tensors are autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.linear_logp import torch_impl
from macpo.kernels.linear_logp.rows import sequence_sums
from macpo.kernels.pair_loss.losses import LOSSES, PairScores
from macpo.kernels.pair_loss.result import PairLoss


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_rows: Tensor,
    ref_logps: Tensor | None,
    *,
    loss: str,
    beta: float,
    label_smoothing: float,
    sft_weight: float,
    num_pairs: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int | None,
    native: bool,
) -> PairLoss:
    """See `op.pair_loss`, which has checked the arguments."""
    logp_n = torch_impl.linear_logp(
        hidden,
        weight,
        target,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
        native=native,
    )
    sums = sequence_sums(logp_n, cu_rows)
    ratios = sums if ref_logps is None else sums - ref_logps.to(device=sums.device, dtype=sums.dtype)
    tokens = cu_rows.diff().to(device=sums.device, dtype=sums.dtype)
    scores = PairScores(ratios[0::2], ratios[1::2], tokens[0::2], tokens[1::2])
    total = LOSSES[loss](scores, beta, label_smoothing).sum() / num_pairs
    sft = -(sums[0::2] / tokens[0::2]).sum() / num_pairs
    if sft_weight:
        total = total + sft_weight * sft

    sums, rewards = sums.detach(), beta * ratios.detach()
    margin = rewards[0::2] - rewards[1::2]
    return PairLoss(
        loss=total,
        chosen_logps=sums[0::2],
        rejected_logps=sums[1::2],
        chosen_rewards=rewards[0::2],
        rejected_rewards=rewards[1::2],
        accuracy=(margin > 0).to(torch.float32).mean(),
        margin=margin.mean(),
        sft_loss=sft.detach(),
    )
