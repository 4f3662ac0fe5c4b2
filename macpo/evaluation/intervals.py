"""Student's t distribution for whole degrees of freedom, exact, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

from macpo.evaluation.metrics import mean_and_se


def t_central(t: float, df: int) -> float:
    """Return P(-t < T < t) for t >= 0 (Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    if df < 1 or t < 0:
        raise ValueError(f"needs df >= 1 and t >= 0, got df={df}, t={t}")
    theta = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    # term_k = cos^(2k or 2k+1) times a ratio of odd and even factors; the series is finite because df is whole
    if df % 2:
        term, total = cosine, 0.0
        for k in range(1, (df - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k) / (2 * k + 1)
        return 2 / math.pi * (theta + sine * total)
    term, total = 1.0, 0.0
    for k in range(1, df // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * k - 1) / (2 * k)
    return sine * total


def t_quantile(df: int, level: float = 0.95) -> float:
    """Return the t with P(-t < T < t) = level: half the width of a two-sided interval in standard errors."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = 0.0, 1.0
    while t_central(high, df) < level:
        low, high = high, high * 2
    while True:
        middle = (low + high) / 2
        if not low < middle < high:  # no float lies between them
            return high
        low, high = (middle, high) if t_central(middle, df) < level else (low, middle)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float] | None:
    """Return (mean, lower, upper) for the mean of independent values; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = mean_and_se(values)
    half = t_quantile(len(values) - 1, level) * error
    return mean, mean - half, mean + half
