"""Intervals and tests for scores of the same prompts: bootstrap, permutation, t, Wilson, sign test, Holm.

Rows are prompts, or several samples or turns of one; those of one cluster (a dialogue) are drawn together. Legend of
shapes: n rows, c clusters, k columns (policies, or what a regression needs of them), b draws. Every statistic here is a
function of column means, so a draw is one row of the matrix product (how often each cluster was drawn) x (its sums).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From means [..., k] to values [..., m]."""

LEVEL, DRAWS, SEED = 0.95, 10_000, 0
_BATCH_DRAWS = 50


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its two-sided interval, 95% unless said otherwise, and a p value of "it is 0" where one was made."""

    value: float
    low: float
    high: float
    p: float | None = None

    @property
    def sign(self) -> int:
        """1 where the whole interval is above 0, -1 where it is below, 0 where it covers 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Rows added up by cluster: `sums` [c, k] and `sizes` [c]."""

    sums: Floats
    sizes: Floats

    @classmethod
    def of(cls, values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Clusters:
        """Add up `values` [n] or [n, k] by cluster; without clusters every row is one.

        Raises ValueError where there is no row, the lengths differ, or a value is not finite.
        """
        table = np.asarray(values, np.float64)
        table = table[:, None] if table.ndim == 1 else table
        if not len(table) or not np.isfinite(table).all():
            raise ValueError("needs one or more rows of finite values")
        if clusters is None:
            return cls(table, np.ones(len(table)))
        if len(clusters) != len(table):
            raise ValueError(f"{len(table)} rows but {len(clusters)} clusters")
        number: dict[Hashable, int] = {}
        of_row = np.array([number.setdefault(cluster, len(number)) for cluster in clusters])
        sums = np.zeros((len(number), table.shape[1]))
        np.add.at(sums, of_row, table)
        return cls(sums, np.bincount(of_row).astype(np.float64))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def means(self) -> Floats:
        """The means [k] over all rows."""
        found: Floats = self.sums.sum(0) / self.sizes.sum()
        return found

    def means_of(self, drawn: NDArray[np.int64]) -> Floats:
        """Return the means [b, k] of draws [b, any] of clusters by number."""
        count = len(self)
        flat = (drawn + count * np.arange(len(drawn))[:, None]).ravel()
        times = np.bincount(flat, minlength=len(drawn) * count).reshape(len(drawn), count).astype(np.float64)
        means: Floats = (times @ self.sums) / (times @ self.sizes)[:, None]
        return means


def the_means(means: Floats) -> Floats:
    """The statistic that is each column's mean."""
    return means


def bootstrap(table: Clusters, statistic: Statistic = the_means, *, seed: int = SEED) -> list[Estimate] | None:
    """Return the m values of a statistic with BCa intervals (Efron 1987) of 10,000 draws of clusters.

    By `scipy.stats.bootstrap`; all columns share the draws, so policies that answered the same prompts are paired. A
    value that is the same in every draw has an interval of no width. None for fewer than two clusters.
    """
    from scipy import stats

    if len(table) < 2:
        return None

    def by_index(drawn: NDArray[np.int64], axis: int = -1) -> Floats:
        values = statistic(table.means_of(np.atleast_2d(drawn)))
        return values.T if drawn.ndim > 1 else values[0]

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(len(table)),),
            by_index,
            vectorized=True,
            n_resamples=DRAWS,
            batch=_BATCH_DRAWS,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    values = statistic(table.means[None])[0]
    bounds = (np.where(np.isnan(side), values, side) for side in found)
    return [Estimate(*map(float, row)) for row in zip(values, *bounds, strict=True)]


def permutation_p(table: Clusters, *, seed: int = SEED) -> list[float]:
    """Return for each column of differences the two-sided p value of "the two policies are exchangeable".

    A cluster's two sides are swapped at random, so its sum changes its sign: `scipy.stats.permutation_test` with
    `permutation_type="samples"`, here with 10,000 draws as matrix products. The observed sides count as one draw, so p
    is never 0 (Phipson & Smyth 2010).
    """
    rng, total = np.random.default_rng(seed), table.sums.sum(0)
    reached = np.ones(len(total))
    for size in _batches(DRAWS):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (size, len(table)), np.int8)
        reached += (np.abs(signs @ table.sums) >= np.abs(total) * (1 - 1e-12)).sum(0)
    return [float(p) for p in reached / (DRAWS + 1)]


def paired_differences(table: Clusters, *, seed: int = SEED) -> list[Estimate] | None:
    """Return each column's mean difference with its BCa interval and permutation p value; None for one cluster."""
    found = bootstrap(table, seed=seed)
    if found is None:
        return None
    return [
        Estimate(each.value, each.low, each.high, p)
        for each, p in zip(found, permutation_p(table, seed=seed), strict=True)
    ]


def t_interval(values: Sequence[float]) -> Estimate | None:
    """Return the mean of independent values with Student's t interval and p value; None for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    if np.ptp(values) < 1e-12:  # the same change everywhere, but for rounding
        return Estimate(mean, mean, mean, float(abs(mean) < 1e-12))
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(LEVEL)
    return Estimate(mean, float(low), float(high), float(found.pvalue))


def wilson(successes: int, trials: int) -> Estimate:
    """Return a share with Wilson's score interval (1927), for example an accuracy. Raises ValueError for no trial."""
    from scipy import stats

    found = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / trials, float(found.low), float(found.high))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p value of "a win is as likely as a loss"; ties do not count (Dixon & Mood 1946)."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number: reject those at most alpha (Holm 1979, sequentially rejective)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(each) for each in adjusted]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, such as that of a score with length; None where a side does not vary."""
    from scipy import stats

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(stats.spearmanr(one, other).statistic)


def resampled_means(seeds: Sequence[Clusters], *, seed: int = SEED) -> Floats:
    """Return 10,000 draws [b, k] of the column means: seeds with replacement, then clusters inside each drawn seed.

    The hierarchical bootstrap (Davison & Hinkley 1997, section 3.8). Every seed weighs the same; with one, prompts
    alone are drawn. All columns share the draws.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(seeds), size=(DRAWS, len(seeds)))
    total = np.zeros((DRAWS, seeds[0].sums.shape[1]))
    for number, table in enumerate(seeds):
        draw_of, _ = np.nonzero(chosen == number)
        start = 0
        for size in _batches(len(draw_of)):
            means = table.means_of(rng.integers(len(table), size=(size, len(table))))
            np.add.at(total, draw_of[start : start + size], means)
            start += size
    return total / len(seeds)


def hierarchical(seeds: Sequence[Clusters], statistic: Statistic, *, seed: int = SEED) -> list[Estimate]:
    """Return the m values of a statistic of the means over seeds, with percentile intervals over seeds and prompts."""
    values = statistic(np.mean([table.means for table in seeds], 0)[None])[0]
    draws = statistic(resampled_means(seeds, seed=seed))
    return [Estimate(float(value), *percentiles(column)) for value, column in zip(values, draws.T, strict=True)]


def percentiles(draws: Floats) -> tuple[float, float]:
    """Return the ends of the interval that holds 95% of the draws [b]."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Gap:
    """Performance gap recovered of several students; `recovered` is None where `gap` covers 0 or is below it."""

    gap: Estimate
    """Ceiling minus weak."""
    recovered: list[Estimate] | None


def gap_recovered(seeds: Sequence[Clusters], *, seed: int = SEED) -> Gap:
    """Return PGR = (student - weak) / (ceiling - weak) with its interval, of columns (weak, ceiling, student, ...).

    A ratio of means (arXiv 2312.09390, section 3; means are over prompts and then seeds), by joint paired bootstrap:
    each draw resamples all three on the same seeds and prompts; intervals are percentiles. Not defined where the
    interval of ceiling - weak is not above 0: there might be no gap at all. Where it is, draws without a gap (at most
    one in 40) say nothing of a share of it and are left out.
    """
    means = np.mean([table.means for table in seeds], 0)
    draws = resampled_means(seeds, seed=seed)
    wide = draws[:, 1] - draws[:, 0]
    gap = Estimate(float(means[1] - means[0]), *percentiles(wide))
    if gap.sign <= 0:
        return Gap(gap, None)
    draws, wide = draws[wide > 0], wide[wide > 0]
    return Gap(
        gap,
        [
            Estimate(float((mean - means[0]) / gap.value), *percentiles((column - draws[:, 0]) / wide))
            for mean, column in zip(means[2:], draws[:, 2:].T, strict=True)
        ],
    )


def length_columns(score: ArrayLike, length: ArrayLike, deviation: float) -> Floats:
    """Return what `at_equal_length` needs, [n, 4] columns (y, x, xx, xy), of the differences between two policies.

    Args:
        score: score differences y [n]. length: length differences [n] in any unit; x is tanh(length / deviation).
        deviation: the standard deviation of all length differences, over seeds too; 0 where none differs.
    """
    y = np.asarray(score, np.float64)
    x = np.tanh(np.asarray(length, np.float64) / deviation) if deviation else np.zeros_like(y)
    return np.stack([y, x, x * x, x * y], 1)


def at_equal_length(means: Floats) -> Floats:
    """Return the difference at equal length [..., 1]: the intercept of score ~ 1 + tanh(length / deviation).

    The length term of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, and `np.tanh(std_delta_len)` in its
    glm_winrate.py), here in a linear regression for one fixed pair of policies. It corrects for a linear use of length
    alone, and what made responses longer may also have made them better.

    Args:
        means: [..., 4] of `length_columns`; where x does not vary the intercept is the mean of y.
    """
    y, x, xx, xy = np.moveaxis(means, -1, 0)
    variance = xx - x * x
    slope = np.divide(xy - x * y, variance, out=np.zeros_like(y), where=variance > 1e-12)
    found: Floats = (y - slope * x)[..., None]
    return found


def _batches(draws: int) -> Iterator[int]:
    """Sizes of at most 50 that add up to `draws`: they bound the memory and fit the cache."""
    for start in range(0, draws, _BATCH_DRAWS):
        yield min(_BATCH_DRAWS, draws - start)
