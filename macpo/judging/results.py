"""What a judge's verdicts say, with 95% intervals: rates, consistency, preferences for a place and for length.

All statistics are scipy's: Wilson's interval of `binomtest` for a share of independent cases, and a bootstrap over
prompts (BCa, 9,999 draws; `scipy.stats.bootstrap`) where a prompt gives a value between 0 and 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from macpo.evaluation.uncertainty import sign_test, wilson
from macpo.judging.verdicts import Judgement

Values = NDArray[np.float64]
_VALUE = {"win": 1.0, "tie": 0.5, "first": 0.5, "second": 0.5, "half": 0.5, "lose": 0.0}
_FIRST = {"A": 1.0, "C": 0.5, "B": 0.0}
DRAWS = 9999


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Estimate(_Part):
    """A value with the ends of its 95% interval, from `number` cases."""

    value: float
    low: float
    high: float
    number: int

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


class Result(_Part):
    """One policy's responses against another's, as a judge sees them.

    Attributes:
        prompts: comparisons; `judged` of them have a verdict in both orders, `failed` have not.
        equal: comparisons of two equal responses, ties that were not asked about.
        win, tie, lose: outcomes; `tie` is all that is neither.
        both_tie, first, second, half: what the ties that were asked about are made of (`verdicts.Outcome`).
        win_rate: a tie counts as half.
        sign_test_p: two-sided, wins against losses alone (`scipy.stats.binomtest`), not corrected for several tests.
        at_equal_length: win rate where both responses are equally long, see `rate_at_equal_length`.
        consistent: share of the comparisons that were asked about in which both orders agree.
        first_wins: how often the place A wins, a tie counts as half; 0.5 without a preference for a place.
        longer_wins: share of wins and losses that go to the response of more characters.
        characters: mean characters of both policies' responses.
        failed_first: questions without a verdict, by the policy whose response stood first.
        unparsed: replies that named no single verdict, also those that were asked again.
        models: what the server calls the models that replied.
        responses: SHA-256 of both files of responses, to know when they have changed.
    """

    policy: str
    opponent: str
    prompts: int
    judged: int
    failed: int
    equal: int
    win: int
    tie: int
    lose: int
    both_tie: int
    first: int
    second: int
    half: int
    win_rate: Estimate | None
    sign_test_p: float | None
    at_equal_length: Estimate | None
    consistent: Estimate | None
    first_wins: Estimate | None
    longer_wins: Estimate | None
    characters: tuple[float, float]
    failed_first: tuple[int, int]
    unparsed: int
    tokens: tuple[int, int] | None
    seconds: float
    models: tuple[str, ...] = ()
    answers: tuple[str, str] | None = None


class Validation(_Part):
    """A judge against people: their chosen response is ours, so that a win is an agreement."""

    result: Result
    kappa: Estimate | None

    @property
    def note(self) -> str:
        """What the accuracy's interval says of the judge, in words."""
        accuracy = self.result.win_rate
        if accuracy is None:
            return "no human pair was judged, so nothing is known of it"
        if accuracy.covers(0.5):
            return "its accuracy on human pairs cannot be told from guessing (the interval covers 0.5)"
        return "it agrees with people more often than not" if accuracy.low > 0.5 else "it contradicts people"


class Judging(_Part):
    """The content of `judging.json`: who judged, and all that it found in a run.

    Attributes:
        judge: what decides the verdicts; `title` says it in words.
    """

    judge: dict[str, Any]
    title: str = ""
    results: tuple[Result, ...] = ()
    validation: Validation | None = None

    def with_result(self, result: Result) -> Judging:
        """The same with one result more, in the place of an earlier one of the same two policies."""
        kept = [each for each in self.results if (each.policy, each.opponent) != (result.policy, result.opponent)]
        return self.model_copy(update={"results": (*kept, result)})


def result_of(judgements: Sequence[Judgement], policy: str, opponent: str) -> Result:
    """Count and estimate; see `Result`."""
    counts = Counter(each.outcome for each in judgements)
    asked = Counter(each.outcome for each in judgements if each.asked)
    judged = [each for each in judgements if each.outcome != "failed"]
    seen = [each for each in judged if each.asked]
    values = np.array([_VALUE[each.outcome] for each in judged])
    characters = np.array([[len(each.comparison.ours), len(each.comparison.theirs)] for each in judgements], float)
    lengths = np.array([len(each.comparison.ours) - len(each.comparison.theirs) for each in judged], float)
    orders = [(each.ours_first, each.theirs_first) for each in judgements]
    tokens = [order.tokens for both in orders for order in both if order.tokens is not None]
    decided = counts["win"] + counts["lose"]
    longer = [
        (value == 1.0) == (more > 0) for value, more in zip(values, lengths, strict=True) if more and value != 0.5
    ]
    return Result(
        policy=policy,
        opponent=opponent,
        prompts=len(judgements),
        judged=len(judged),
        failed=counts["failed"],
        equal=sum(not each.asked for each in judgements),
        win=counts["win"],
        tie=len(judged) - decided,
        lose=counts["lose"],
        both_tie=asked["tie"],
        first=asked["first"],
        second=asked["second"],
        half=asked["half"],
        win_rate=mean_estimate(values),
        sign_test_p=sign_test(counts["win"], counts["lose"]) if decided else None,
        at_equal_length=rate_at_equal_length(values, lengths),
        consistent=share(sum(each.outcome in ("win", "tie", "lose") for each in seen), len(seen)),
        first_wins=mean_estimate(np.array([_first(each) for each in seen])),
        longer_wins=share(sum(longer), len(longer)),
        characters=(float(characters[:, 0].mean()), float(characters[:, 1].mean())) if judgements else (0.0, 0.0),
        failed_first=(sum(not one.verdict for one, _ in orders), sum(not two.verdict for _, two in orders)),
        unparsed=sum(order.unparsed for both in orders for order in both),
        tokens=(sum(each[0] for each in tokens), sum(each[1] for each in tokens)) if tokens else None,
        seconds=round(sum(order.seconds for both in orders for order in both), 3),
        models=tuple(sorted({name for both in orders for order in both for name in order.models})),
    )


def validation_of(judgements: Sequence[Judgement]) -> Validation:
    """How a judge agrees with people, from comparisons in which `ours` is the response that they chose."""
    values = np.array([_VALUE[each.outcome] for each in judgements if each.outcome != "failed"])
    kappa = estimate(values, kappa_with_humans) if len(values) else None
    return Validation(result=result_of(judgements, "chosen", "rejected"), kappa=kappa)


def kappa_with_humans(values: Values, axis: int = -1) -> Any:
    """Cohen's kappa of a judge's outcomes with people's choices (Cohen 1960, Educ. Psychol. Meas. 20:37-46).

    kappa = (p_o - p_e) / (1 - p_e). Every pair counts in both orders, so people say A and B equally often and never
    "tie"; the judge says A and B equally often too, (win + lose) / 2 each, so p_o = win and p_e = (win + lose) / 2.

    Args:
        values: 1 where the judge agrees with people, 0 where it contradicts them, 0.5 for a tie; float64.
    """
    win, lose = (values == 1.0).mean(axis=axis), (values == 0.0).mean(axis=axis)
    expected = (win + lose) / 2
    return (win - expected) / (1 - expected)


def share(count: int, number: int) -> Estimate | None:
    """A share of independent cases with Wilson's interval; None without a case."""
    if not number:
        return None
    found = wilson(count, number)
    return Estimate(value=found.value, low=found.low, high=found.high, number=number)


def mean_estimate(values: Values) -> Estimate | None:
    """The mean of values in [0, 1], one a prompt, with its bootstrap interval; None without a value."""
    return estimate(values, np.mean) if len(values) else None


def estimate(values: Values, statistic: Callable[..., Any]) -> Estimate:
    """A statistic of values in [0, 1], one a prompt, with a bootstrap interval over prompts (BCa).

    Where all values are equal, resampling shows no spread. The interval then holds what the statistic would be if a
    share of the prompts had any other value, up to the upper end of Wilson's interval for none among so many.

    Args:
        statistic: of [..., n] float64 along `axis`.
    """
    from scipy import stats

    value, number = float(statistic(values, axis=-1)), len(values)
    if np.ptp(values) == 0:
        unseen = wilson(0, number).high
        many = np.full((3, 10_000), values[0])
        many[:, : round(unseen * 10_000)] = [[0.0], [0.5], [1.0]]
        ends = [value, *map(float, statistic(many, axis=-1))]
        return Estimate(value=value, low=min(ends), high=max(ends), number=number)
    found = stats.bootstrap(
        (values,), statistic, n_resamples=DRAWS, batch=max(1, 4_000_000 // number), method="BCa", vectorized=True, rng=0
    ).confidence_interval
    return Estimate(value=value, low=float(found.low), high=float(found.high), number=number)


def rate_at_equal_length(values: Values, lengths: Values) -> Estimate | None:
    """The win rate that is left at equal length: the intercept of a line through win, tie and lose.

    The line is value ~ a + b tanh(d / sd), d the difference of lengths in characters and sd its standard deviation. It
    is the idea of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, section 3) for one pair of
    policies, with a straight line in the place of a logistic one, because a tie is half a win here. The interval is
    Student's t of `scipy.stats.linregress`. None with fewer than three comparisons, with one value or one length, and
    where every point lies on the line, which then has no interval.

    Args:
        values: 1, 0.5 or 0 for each comparison. lengths: characters of ours minus theirs.
    """
    from scipy import stats

    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(lengths) == 0:
        return None
    line = stats.linregress(np.tanh(lengths / lengths.std()), values)
    if line.intercept_stderr < 1e-6:  # rounding alone
        return None
    reach = float(stats.t.ppf(0.975, len(values) - 2) * line.intercept_stderr)
    middle = float(line.intercept)
    return Estimate(
        value=min(max(middle, 0.0), 1.0),
        low=min(max(middle - reach, 0.0), 1.0),
        high=min(max(middle + reach, 0.0), 1.0),
        number=len(values),
    )


def _first(judgement: Judgement) -> float:
    """How far the place A won in both orders."""
    return (_FIRST[judgement.ours_first.verdict] + _FIRST[judgement.theirs_first.verdict]) / 2
