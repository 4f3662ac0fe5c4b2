"""Contrastive preference losses: pure functions of summed log-probs, a loss and its slopes per pair.

The one copy of this maths: value and derivative stand together, because they are taken inside custom operators, where
autograd does not reach.
A log-ratio is log p_policy(y | x) - log p_reference(y | x), summed over the response's tokens; without a reference it
is the log-prob. |y| is a response's number of tokens, d the difference of the log-ratios, chosen minus rejected.
Legend: b pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairScores:
    """The inputs of a loss; every field is [B] float."""

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

    def mean(self) -> PairScores:
        """The log-ratios per token."""
        return replace(self, chosen=self.chosen / self.chosen_tokens, rejected=self.rejected / self.rejected_tokens)


@dataclass(frozen=True, slots=True)
class LossSettings:
    """A loss and its parameters, whose meaning each loss documents."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float | None = None
    ld_alpha: float | None = None
    sft_weight: float = 0.0


# -> loss, d loss / d chosen, d loss / d rejected, each [B]
Terms: TypeAlias = tuple[Tensor, Tensor, Tensor]
Loss: TypeAlias = Callable[[PairScores, LossSettings], Terms]


def sigmoid(scores: PairScores, s: LossSettings) -> Terms:
    """DPO, eq. 7 of arXiv 2305.18290; with label_smoothing e conservative DPO (Mitchell 2023, eq. 3).

    -(1 - e) log sigma(beta d) - e log sigma(-beta d). TRL 1.16 ignores label_smoothing here; we apply it.
    With ld_alpha it is length-desensitised DPO (LD-DPO, arXiv 2409.06411): in every sum the tokens beyond the shorter
    response's length count ld_alpha times (`sequences.row_weights`).
    """
    margin, e = s.beta * scores.delta, s.label_smoothing
    loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
    slope = s.beta * (e * torch.sigmoid(margin) - (1 - e) * torch.sigmoid(-margin))
    return loss, slope, -slope


def sigmoid_norm(scores: PairScores, s: LossSettings) -> Terms:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, section 5.1.2): DPO of the log-ratios per token.

    -log sigma(beta (chosen / |chosen| - rejected / |rejected|)).
    """
    margin = s.beta * scores.mean().delta
    slope = -s.beta * torch.sigmoid(-margin)
    return -F.logsigmoid(margin), slope / scores.chosen_tokens, -slope / scores.rejected_tokens


def robust(scores: PairScores, s: LossSettings) -> Terms:
    """rDPO, eq. 11 of arXiv 2403.00409: unbiased where a share e of the pairs is swapped.

    (-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e).
    """
    margin, e = s.beta * scores.delta, s.label_smoothing
    loss = (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)
    slope = -s.beta * (e * torch.sigmoid(margin) + (1 - e) * torch.sigmoid(-margin)) / (1 - 2 * e)
    return loss, slope, -slope


def hinge(scores: PairScores, s: LossSettings) -> Terms:
    """SLiC's hinge (arXiv 2305.10425) on the log-ratios, as in RSO (arXiv 2309.06657, eq. 9): max(0, 1 - beta d)."""
    loss = torch.relu(1 - s.beta * scores.delta)
    slope = -s.beta * (loss > 0).to(loss.dtype)
    return loss, slope, -slope


def ipo(scores: PairScores, s: LossSettings) -> Terms:
    """IPO, eq. 17 of arXiv 2310.12036 with tau = beta: (d - 1 / (2 beta)) ** 2.

    Log-ratios are means over a response's tokens, as the authors reported results (and as TRL computes it);
    the paper's equation has sums.
    """
    gap = scores.mean().delta - 1 / (2 * s.beta)
    return gap**2, 2 * gap / scores.chosen_tokens, -2 * gap / scores.rejected_tokens


def simpo(scores: PairScores, s: LossSettings) -> Terms:
    """SimPO, eq. 6 of arXiv 2405.14734: no reference, log-probs per token, a target margin gamma.

    -log sigma(beta (chosen / |chosen| - rejected / |rejected|) - gamma). The paper's beta is 2 to 2.5 and its gamma
    0.5 to 1.5 or so; gamma is in units of the reward, as TRL's `simpo_gamma`.
    """
    assert s.gamma is not None
    margin = s.beta * scores.mean().delta - s.gamma
    slope = -s.beta * torch.sigmoid(-margin)
    return -F.logsigmoid(margin), slope / scores.chosen_tokens, -slope / scores.rejected_tokens


def orpo(scores: PairScores, s: LossSettings) -> Terms:
    """ORPO, eq. 6 and 7 of arXiv 2403.07691: lambda * L_OR, with our beta as lambda and our SFT term as L_SFT.

    L_OR = -log sigma(log odds(chosen) - log odds(rejected)) with odds = p / (1 - p) of p = exp(log-prob per token).
    sft_weight is 1 unless given, so that the sum is the paper's. Its NLL is the response's alone, one mean a pair;
    TRL 1.16 takes the prompt's tokens in and one mean a batch. p is held below 1 by 1e-7, where the odds end.
    """
    mean = scores.mean()
    chosen, dchosen = _log_odds(mean.chosen)
    rejected, drejected = _log_odds(mean.rejected)
    slope = -s.beta * torch.sigmoid(rejected - chosen)
    return (
        -s.beta * F.logsigmoid(chosen - rejected),
        slope * dchosen / scores.chosen_tokens,
        -slope * drejected / scores.rejected_tokens,
    )


def _log_odds(logp: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) and its derivative 1 / (1 - p), from log p."""
    held = logp.clamp(max=-1e-7)
    near = held > -math.log(2)  # two forms of log(1 - p), each where it keeps its digits
    high, low = torch.where(near, held, -1.0), torch.where(near, -1.0, held)
    log1m = torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))
    return held - log1m, torch.where(logp == held, -1 / torch.expm1(held), 0.0)


def sft(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """NLL of the chosen response per token, the term added by arXiv 2404.19733 (eq. 1) and LLaMA-Factory's `pref_ftx`.

    chosen_logps are log-probs, not ratios. The paper's NLL covers chain of thought and response, which is our response.
    """
    return -chosen_logps / chosen_tokens


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
    "orpo": orpo,
}
SMOOTHED = frozenset({"sigmoid", "robust"})
"""Losses that take label_smoothing."""
DESENSITISED = frozenset({"sigmoid", "robust", "hinge"})
"""Losses of summed log-ratios, which take ld_alpha; the others divide by the length."""
REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Losses without a reference; their reward is beta times the log-prob per token."""


def check_loss(s: LossSettings, has_reference: bool) -> None:
    """Raise ValueError for an unknown loss or a setting that the loss would have to ignore."""
    loss = s.loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
    if not s.beta > 0:
        raise ValueError(f"beta must be positive, got {s.beta}")
    if not 0 <= s.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {s.label_smoothing}")
    if s.label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"loss {loss!r} has no label_smoothing; it belongs to {', '.join(sorted(SMOOTHED))}")
    if s.gamma is not None and loss != "simpo":
        raise ValueError(f"loss {loss!r} has no gamma; it belongs to simpo")
    if loss == "simpo" and (s.gamma is None or not math.isfinite(s.gamma)):
        raise ValueError(f"loss 'simpo' needs gamma, its target margin, got {s.gamma}")
    if s.ld_alpha is not None:
        if loss not in DESENSITISED:
            raise ValueError(f"loss {loss!r} has no ld_alpha; it belongs to {', '.join(sorted(DESENSITISED))}")
        if not 0 <= s.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {s.ld_alpha}")
    if has_reference and loss in REFERENCE_FREE:
        raise ValueError(f"loss {loss!r} has no reference, but ref_logps were given")
    if not s.sft_weight >= 0:
        raise ValueError(f"sft_weight must not be negative, got {s.sft_weight}")
