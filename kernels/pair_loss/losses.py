"""Contrastive preference losses: pure functions of log-ratios, one loss a pair. The one copy of this maths.

A log-ratio is log p_policy(y | x) - log p_reference(y | x), summed over the response's tokens.
Legend: b pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairScores:
    """What a loss may look at; every field [B] float."""

    chosen: Tensor
    """Log-ratio of the chosen response."""
    rejected: Tensor
    """Log-ratio of the rejected response."""
    chosen_tokens: Tensor
    """Tokens of the chosen response."""
    rejected_tokens: Tensor
    """Tokens of the rejected response."""

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected


Loss: TypeAlias = Callable[[PairScores, float, float], Tensor]  # scores, beta, label_smoothing -> [B]


def sigmoid(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """DPO, eq. 7 of arXiv 2305.18290; with label_smoothing e conservative DPO (Mitchell 2023, eq. 3).

    -(1 - e) log sigma(beta d) - e log sigma(-beta d). TRL 1.16 ignores label_smoothing here; we apply it.
    """
    margin = beta * scores.delta
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """rDPO, eq. 11 of arXiv 2403.00409: unbiased where a share e of the pairs is swapped.

    (-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e).
    """
    margin = beta * scores.delta
    clean = -(1 - label_smoothing) * F.logsigmoid(margin)
    flipped = -label_smoothing * F.logsigmoid(-margin)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def hinge(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on the log-ratios, as in RSO (arXiv 2309.06657, eq. 9)."""
    return torch.relu(1 - beta * scores.delta)


def ipo(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """IPO, eq. 17 of arXiv 2310.12036 with tau = beta.

    Log-ratios are means over a response's tokens, as the authors reported results (and as TRL computes it);
    the paper's equation has sums.
    """
    delta = scores.chosen / scores.chosen_tokens - scores.rejected / scores.rejected_tokens
    return (delta - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge, "robust": robust}
SMOOTHED = frozenset({"sigmoid", "robust"})
"""Losses that label_smoothing means something for."""


def check_loss(loss: str, beta: float, label_smoothing: float) -> None:
    """Raise ValueError for an unknown loss or a setting that the loss would have to ignore."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"loss {loss!r} has no label_smoothing; it belongs to {', '.join(sorted(SMOOTHED))}")
