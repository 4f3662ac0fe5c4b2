"""How well a scorer agrees with people: pure functions of the scores that it gives to both responses of human pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macpo.evaluation.uncertainty import rank_correlation, wilson

NUM_BINS = 10
Floats = NDArray[np.float64]


def agreement(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_tokens: Sequence[float],
    rejected_tokens: Sequence[float],
) -> dict[str, float | int | None]:
    """Measure how well scores tell chosen from rejected responses, on pairs that the scorer never trained on.

    Args are one number a pair: the scores r+ and r-, and the lengths of the responses in tokens.

    Returns
        `loss`: mean -log sigma(r+ - r-), in nats; log 2 for a scorer that tells nothing apart;
        `reward_accuracy`: share of pairs with r+ > r-; a tie counts as wrong, as TRL's RewardTrainer and RewardBench
        count it; with Wilson's 95% interval, `reward_accuracy_low` and `reward_accuracy_high`, and `_se`;
        `reward_pairs`: their number;
        `reward_ece`: expected calibration error, see `calibration_error`; it says something of rewards in nats alone;
        `reward_accuracy_shorter`, `reward_accuracy_longer`: the accuracy where chosen is the shorter or the longer
        response, None without such pairs, and their numbers `reward_pairs_shorter`, `reward_pairs_longer`;
        `reward_length_correlation`: Spearman's rank correlation of score and length over all responses; None where
        one of them does not vary.

    Raises ValueError on unequal lengths, no pair, or a score that is not finite.
    """
    columns = [np.asarray(column, np.float64) for column in (chosen, rejected, chosen_tokens, rejected_tokens)]
    if len({len(column) for column in columns}) != 1 or not len(columns[0]):
        raise ValueError(f"needs one or more pairs, equally many in each column; got {[len(c) for c in columns]}")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("a score is not finite")
    difference, longer = columns[0] - columns[1], columns[2] - columns[3]
    right = difference > 0
    interval = wilson(int(right.sum()), len(right))
    accuracy = float(right.mean())
    found: dict[str, float | int | None] = {
        "loss": float(np.logaddexp(0.0, -difference).mean()),
        "reward_accuracy": accuracy,
        "reward_accuracy_se": float(np.sqrt(accuracy * (1 - accuracy) / len(right))),
        "reward_accuracy_low": float(interval.low),
        "reward_accuracy_high": float(interval.high),
        "reward_pairs": len(right),
        "reward_ece": calibration_error(difference),
    }
    for name, part in (("shorter", longer < 0), ("longer", longer > 0)):
        found[f"reward_accuracy_{name}"] = float(right[part].mean()) if part.any() else None
        found[f"reward_pairs_{name}"] = int(part.sum())
    scores, lengths = np.concatenate(columns[:2]), np.concatenate(columns[2:])
    found["reward_length_correlation"] = rank_correlation(scores.tolist(), lengths.tolist())
    return found


def calibration_error(difference: Floats) -> float:
    """Return the expected calibration error of sigma(|r+ - r-|), the stated chance that the better scored is right.

    The mean over pairs of |share that is right - mean stated chance| by bin: 10 bins of equal width from .5 to 1, as no
    pair is stated below .5 (Guo et al. 2017, arXiv 1706.04599, equation 3). A tie is half right.
    """
    stated = 1.0 / (1.0 + np.exp(-np.abs(difference)))
    right = (difference > 0) + 0.5 * (difference == 0)
    bins = np.minimum(((stated - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right - stated, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(difference))


def may_be_headline(found: Mapping[str, Any]) -> bool:
    """Return whether the whole interval of a scorer's accuracy lies above one half."""
    return bool(found["reward_accuracy_low"] > 0.5)


def in_words(name: str, found: Mapping[str, Any]) -> str:
    """Say how well a scorer agrees with people, and what follows from it."""
    low, high = (found.get(f"reward_accuracy_{end}", 0.0) for end in ("low", "high"))
    text = (
        f"{name} agrees with people on {found['reward_accuracy']:.1%} of {found.get('reward_pairs', 0):,} held-out "
        f"pairs (95% interval {low:.1%} to {high:.1%})"
    )
    if low > 0.5:
        return f"{text}."
    half = "that covers one half" if high >= 0.5 else "that lies below one half"
    return f"{text}: an interval {half}, so its scores cannot be the headline."
