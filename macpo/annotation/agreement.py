"""How far people agree, with themselves, with one another and with anybody else's outcomes. Pure functions.

Outcomes are 1 (the first policy is better), 0 (a tie) and -1 (the second one is); intervals are of 95%.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macpo.evaluation.uncertainty import wilson

OUTCOMES = (1, 0, -1)
DRAWS, ALPHA_DRAWS = 10_000, 2_000
Interval = tuple[float, float]


def share_with_interval(count: int, of: int) -> dict[str, Any]:
    """Return {"count", "of", "share", "interval"} with Wilson's score interval; None for both of nothing."""
    if not of:
        return {"count": 0, "of": 0, "share": None, "interval": None}
    found = wilson(count, of)
    return {"count": count, "of": of, "share": found.value, "interval": [found.low, found.high]}


def mean_interval(values: Sequence[float], seed: int) -> Interval | None:
    """Return the interval of a mean of independent values in [0, 1] by bootstrap (BCa, 10,000 draws).

    Where all values are 0, or all are 1, every draw is the same and the bootstrap says nothing: Wilson's score interval
    then. None for fewer than two values, or for other values that are all the same.
    """
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        if values[0] not in (0, 1):
            return None
        low, high = share_with_interval(int(values[0]) * len(values), len(values))["interval"]
        return low, high
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    found = bootstrap((np.asarray(values),), np.mean, n_resamples=DRAWS, method="BCa", batch=1000, rng=rng)
    low, high = found.confidence_interval
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def majority(outcomes: Sequence[int]) -> int:
    """Return the outcome that more than half of the people gave, else a tie."""
    (outcome, count), *_ = Counter(outcomes).most_common(1)
    return outcome if 2 * count > len(outcomes) else 0


def counts_of(outcomes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return how many people gave each outcome, [items, 3], for the items that two people or more judged."""
    rows = [[given.count(outcome) for outcome in OUTCOMES] for given in outcomes if len(given) > 1]
    return np.asarray(rows, np.int64).reshape(-1, len(OUTCOMES))


def alpha(counts: NDArray[np.int64]) -> float | None:
    """Return Krippendorff's alpha for nominal data (Krippendorff, Content Analysis, 2004, chapter 11).

    1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement. None where it is not defined: no item
    with two judgements, or one outcome alone, of which chance would agree as well.
    """
    if (counts.sum(0) > 0).sum() < 2:
        return None
    import krippendorff

    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def alpha_interval(counts: NDArray[np.int64], seed: int) -> Interval | None:
    """Return the percentile interval of alpha by a bootstrap over items (2,000 draws).

    Draws for which alpha is not defined are left out; None where they are more than a twentieth.
    """
    rng = np.random.default_rng(seed)
    if alpha(counts) is None:
        return None
    drawn = (alpha(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(ALPHA_DRAWS))
    defined = [value for value in drawn if value is not None]
    if len(defined) < 0.95 * ALPHA_DRAWS:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def cohen_kappa(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Return Cohen's kappa of two raters of the same items, (p_o - p_e) / (1 - p_e).

    p_o is the share of items on which they agree, p_e what two people with their shares of outcomes would agree on by
    chance (Cohen, Educational and Psychological Measurement 20, 1960, equation 1). None without an item, or where p_e
    is 1.
    """
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    shares = [Counter(rater) for rater in (first, second)]
    chance = sum(shares[0][outcome] * shares[1][outcome] for outcome in OUTCOMES) / len(first) ** 2
    return None if math.isclose(chance, 1) else (observed - chance) / (1 - chance)


def compared(people: Mapping[str, int], others: Mapping[str, int]) -> dict[str, Any]:
    """Compare two outcomes of the same items, those of people by majority with anybody else's.

    Returns {"items", "kappa", "decided"}: kappa over the three outcomes of all items that both have, and the share of
    the same winner among those on which neither says tie.
    """
    shared = sorted(people.keys() & others.keys())
    both = [(people[item], others[item]) for item in shared]
    decided = [(a, b) for a, b in both if a and b]
    return {
        "items": len(shared),
        "kappa": cohen_kappa([a for a, _ in both], [b for _, b in both]),
        "decided": share_with_interval(sum(a == b for a, b in decided), len(decided)),
    }
