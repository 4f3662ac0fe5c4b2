"""Intervals and tests: against scipy used directly, brute force, and published examples."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from macpo.evaluation.uncertainty import (
    DRAWS,
    Clusters,
    Estimate,
    at_equal_length,
    bootstrap,
    gap_recovered,
    hierarchical,
    holm,
    length_columns,
    paired_differences,
    percentiles,
    permutation_p,
    rank_correlation,
    resampled_means,
    sign_test,
    t_interval,
    the_means,
    wilson,
)

RNG = np.random.default_rng(20)
SKEWED = RNG.exponential(size=40) - 0.7  # BCa differs from percentiles here
CLUSTERS = [i // 3 for i in range(40)]  # 13 of three rows and one of one


def only(found: list[Estimate] | None) -> Estimate:
    assert found is not None
    (estimate,) = found
    return estimate


@pytest.mark.parametrize("clusters", [None, CLUSTERS], ids=["rows", "clusters"])
def test_bootstrap_is_scipys_bca_of_a_ratio_of_sums(clusters: list[int] | None) -> None:
    table = Clusters.of(SKEWED, clusters)
    ours = only(bootstrap(table))
    theirs = stats.bootstrap(
        (table.sums[:, 0], table.sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=DRAWS,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert ours.value == pytest.approx(SKEWED.mean())


def test_columns_share_their_draws_and_are_what_each_is_alone() -> None:
    other = RNG.normal(size=40)
    both = bootstrap(Clusters.of(np.stack([SKEWED, other], 1)))
    assert both is not None
    for found, column in zip(both, (SKEWED, other), strict=True):
        alone = only(bootstrap(Clusters.of(column)))
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high), rel=1e-9)


def test_more_rows_of_the_same_clusters_are_no_more_evidence() -> None:
    """Every prompt four times, as four equal samples of it: the interval and p value stay what they were."""
    once, p = only(paired_differences(Clusters.of(SKEWED))), permutation_p(Clusters.of(SKEWED))
    four = Clusters.of(np.repeat(SKEWED, 4), np.repeat(np.arange(40), 4).tolist())
    again = only(paired_differences(four))
    assert (again.low, again.high) == pytest.approx((once.low, once.high)) and [again.p] == p
    alone = only(bootstrap(Clusters.of(np.repeat(SKEWED, 4))))
    assert alone.high - alone.low < 0.6 * (once.high - once.low)  # as if they were independent: about half as wide


@pytest.mark.parametrize("clusters", [None, [0, 0, 1, 2, 3, 4, 5, 6]], ids=["rows", "clusters"])
def test_permutation_p_is_scipys_exact_one(clusters: list[int] | None) -> None:
    one, other = np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 2, 1, 0, 3, 7, 2, 2])
    a, b = Clusters.of(one, clusters).sums[:, 0], Clusters.of(other, clusters).sums[:, 0]
    exact = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    (ours,) = permutation_p(Clusters.of(one - other, clusters))
    assert ours == pytest.approx(exact, abs=4 * math.sqrt(exact / DRAWS))  # four standard errors of 10,000 draws
    assert permutation_p(Clusters.of(np.zeros(8))) == [1.0]


# Student 1908, table of the two sleeping drugs (R's `sleep`): t = -4.0621, df 9, p .002833, interval -2.4599 to -.7001
SLEEP = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]) - np.array(
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
)


def test_t_interval_of_students_own_example() -> None:
    found = t_interval(SLEEP.tolist())
    assert found is not None and found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.value, found.low, found.high) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=5e-7)
    assert t_interval([0.4]) is None
    assert t_interval([0.5] * 3) == Estimate(0.5, 0.5, 0.5, 0.0)
    assert t_interval([0.0] * 3) == Estimate(0.0, 0.0, 0.0, 1.0)


# Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score without continuity correction)
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombes_table(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError):
        wilson(0, 0)


def test_sign_test_sums_the_binomial_tails() -> None:
    for wins, losses in [(9, 1), (3, 3), (0, 5), (12, 20)]:
        n, k = wins + losses, min(wins, losses)
        tails = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        assert sign_test(wins, losses) == pytest.approx(min(tails, 1.0))
    assert sign_test(0, 0) == 1.0


def test_holm_rejects_step_by_step() -> None:
    """Holm 1979: the smallest p is compared with alpha / m, the next with alpha / (m - 1), until one is too large."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(..., "holm")
    for p in itertools.product([0.001, 0.012, 0.02, 0.04, 0.3], repeat=3):
        rejected = set()
        for step, index in enumerate(sorted(range(3), key=lambda i: p[i])):
            if p[index] > 0.05 / (3 - step):
                break
            rejected.add(index)
        assert {i for i, each in enumerate(holm(p)) if each <= 0.05 + 1e-12} == rejected
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


def test_rank_correlation() -> None:
    """Hand computed, with a tie: ranks 1 2 3.5 3.5 and 2 1 3 4; Pearson of the ranks."""
    ranks = np.corrcoef([1, 2, 3.5, 3.5], [2, 1, 3, 4])[0, 1]
    assert rank_correlation([1, 5, 9, 9], [7, 2, 8, 100]) == pytest.approx(ranks)
    assert rank_correlation([1, 2], [3, 3]) is None and rank_correlation([1], [2]) is None


def brute(seeds: list[np.ndarray], statistic, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Seeds, then rows, one draw at a time."""
    found = []
    for _ in range(draws):
        picked = [seeds[k] for k in rng.integers(len(seeds), size=len(seeds))]
        means = [table[rng.integers(len(table), size=len(table))].mean(0) for table in picked]
        found.append(statistic(np.mean(means, 0)))
    return np.array(found)


def test_hierarchical_draws_seeds_and_then_rows() -> None:
    seeds = [RNG.normal(shift, 1, (n, 1)) for shift, n in ((0.0, 30), (0.5, 50), (1.2, 20))]
    (ours,) = hierarchical([Clusters.of(table) for table in seeds], the_means)
    slow = brute(seeds, lambda m: m[0], 4000, np.random.default_rng(1))
    assert ours.value == pytest.approx(np.mean([table.mean() for table in seeds]))
    assert (ours.low, ours.high) == pytest.approx(percentiles(slow), abs=0.04)  # of draws with a deviation of .3
    within = hierarchical([Clusters.of(np.concatenate(seeds))], the_means)[0]
    assert ours.high - ours.low > 1.5 * (within.high - within.low)  # what seeds differ by is in it


def test_one_seed_is_the_plain_bootstrap() -> None:
    draws = resampled_means([Clusters.of(SKEWED)])
    assert draws.shape == (DRAWS, 1)
    assert draws.mean() == pytest.approx(SKEWED.mean(), abs=0.01)
    assert draws.std() == pytest.approx(SKEWED.std() / math.sqrt(40), rel=0.03)


def people(n: int = 200) -> np.ndarray:
    """Columns weak, ceiling, student: a prompt's difficulty is common to all three."""
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, n)
    return np.stack([hard + mean + rng.normal(0, 0.2, n) for mean in (0.0, 1.0, 0.6)], 1)


def test_gap_recovered_is_the_joint_bootstrap_of_a_ratio() -> None:
    table = people()
    found = gap_recovered([Clusters.of(table)])
    weak, ceiling, student = table.mean(0)
    assert found.recovered is not None
    (pgr,) = found.recovered
    assert pgr.value == pytest.approx((student - weak) / (ceiling - weak))
    slow = brute([table], lambda m: (m[2] - m[0]) / (m[1] - m[0]), 3000, np.random.default_rng(2))
    assert (pgr.low, pgr.high) == pytest.approx(percentiles(slow), abs=0.004)
    shuffled = np.stack([np.random.default_rng(k).permutation(table[:, k]) for k in range(3)], 1)
    apart = gap_recovered([Clusters.of(shuffled)]).recovered
    assert apart is not None and apart[0].high - apart[0].low > 3 * (pgr.high - pgr.low)  # pairing is what helps


def test_no_gap_no_share_of_it() -> None:
    rng = np.random.default_rng(5)
    level = gap_recovered([Clusters.of(rng.normal([0, 0.1, 0.1], 1, (50, 3)))])
    assert level.recovered is None and level.gap.low < 0 < level.gap.high
    above = gap_recovered([Clusters.of(rng.normal([1, 0, 0], 0.1, (50, 3)))])
    assert above.recovered is None and above.gap.high < 0  # the weak one is better than the ceiling


def test_draws_without_a_gap_say_nothing_of_a_share_of_it() -> None:
    table = np.array([[0.0, float(n < 4), 0.0] for n in range(24)])  # 1% of the draws have none of the four
    found = gap_recovered([Clusters.of(table)])
    assert found.gap.low > 0 and found.recovered is not None
    assert (only(found.recovered).low, only(found.recovered).high) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_no_statistic_of_few_prompts_with_ties_is_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 25))
    table = rng.choice([0.0, 0.5, 1.0], (n, 3), p=[0.8, 0.1, 0.1])
    lengths = rng.integers(5, 5 + 1 + seed % 3, n)
    clusters = Clusters.of(table)
    gap = gap_recovered([clusters])
    found = [gap.gap, *(gap.recovered or []), *hierarchical([clusters, clusters], the_means)]
    found += bootstrap(clusters) or []
    found += paired_differences(clusters) or []
    found += hierarchical([Clusters.of(length_columns(table[:, 0], lengths, float(lengths.std())))], at_equal_length)
    for estimate in found:
        numbers = (estimate.value, estimate.low, estimate.high, 0.0 if estimate.p is None else estimate.p)
        assert np.isfinite(numbers).all(), estimate


def test_at_equal_length_is_the_intercept_of_least_squares() -> None:
    rng = np.random.default_rng(7)
    length = rng.normal(30, 40, 400)  # responses are 30 words longer on average, and judged better for that alone
    deviation = float(length.std())
    score = 0.5 * np.tanh(length / deviation) + rng.normal(0, 0.1, 400)
    (found,) = hierarchical([Clusters.of(length_columns(score, length, deviation))], at_equal_length)
    columns = np.stack([np.ones(400), np.tanh(length / deviation)], 1)
    intercept = np.linalg.lstsq(columns, score, rcond=None)[0][0]
    assert found.value == pytest.approx(intercept)
    assert found.low < 0 < found.high and score.mean() > 0.15
    error = np.sqrt(np.linalg.inv(columns.T @ columns)[0, 0]) * np.std(score - columns @ [intercept, 0.5])
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    halves = [Clusters.of(length_columns(score[half], length[half], deviation)) for half in np.split(np.arange(400), 2)]
    assert hierarchical(halves, at_equal_length)[0].value == pytest.approx(
        intercept
    )  # seeds of one size: one regression
    (equal,) = hierarchical([Clusters.of(length_columns(score, np.zeros(400), 0.0))], at_equal_length)
    assert equal.value == pytest.approx(score.mean())


def test_what_does_not_vary_has_an_interval_of_no_width() -> None:
    assert only(paired_differences(Clusters.of([0.5] * 9))).low == 0.5
    zero = only(paired_differences(Clusters.of([0.0] * 9)))
    assert (zero.low, zero.high, zero.p, zero.sign) == (0.0, 0.0, 1.0, 0)
    assert bootstrap(Clusters.of([1.0, 2.0], ["one", "one"])) is None
    assert [Estimate(0, *ends).sign for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1))] == [1, -1, 0, 0]


@pytest.mark.parametrize("bad", [[], [math.nan], [math.inf]])
def test_values_that_are_no_numbers_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Clusters.of(bad)
    with pytest.raises(ValueError, match="2 rows but 1 clusters"):
        Clusters.of([1.0, 2.0], ["a"])


def test_ten_thousand_draws_of_two_thousand_prompts_take_less_than_a_second() -> None:
    table = Clusters.of(np.random.default_rng(0).normal(size=(2000, 3)))
    for make in (bootstrap, permutation_p, lambda each: gap_recovered([each])):
        start = time.process_time()
        make(table)
        assert time.process_time() - start < 1.0
