"""What verdicts say: rates and intervals against published values, brute force and constructed cases."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest

from macpo.engine.errors import DataError
from macpo.judging.costs import Prices, cost_of
from macpo.judging.folder import JudgingFolder, read_judging
from macpo.judging.questions import Comparison
from macpo.judging.results import (
    Judging,
    estimate,
    kappa_with_humans,
    mean_estimate,
    rate_at_equal_length,
    result_of,
    share,
    validation_of,
)
from macpo.judging.verdicts import Judgement, Order

ORDERS = {"win": "AB", "lose": "BA", "tie": "CC", "first": "AA", "second": "BB", "half": "CA", "failed": "A "}


def judgement(outcome: str, ours: str = "x", theirs: str = "y", number: int = 0) -> Judgement:
    one, two = ORDERS[outcome].replace(" ", "?")
    found = Judgement(Comparison(f"p{number}", (), ours, theirs), Order(one.strip("?")), Order(two.strip("?")))
    assert found.outcome == outcome
    return found


@pytest.mark.parametrize(
    ("count", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_interval(count, number, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    found = share(count, number)
    assert found is not None and (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert share(0, 0) is None


def test_kappa_is_cohens_of_both_orders():
    """Against a confusion table of every label, people's and the judge's, with each pair shown in both orders."""
    outcomes = ["win"] * 11 + ["lose"] * 4 + ["tie"] * 3 + ["first"] * 2
    people, judge = [], []
    for outcome in outcomes:
        preferred = {"win": "chosen", "lose": "rejected"}.get(outcome, "tie")
        for first in ("chosen", "rejected"):
            people.append("A" if first == "chosen" else "B")
            judge.append("tie" if preferred == "tie" else "A" if preferred == first else "B")
    n = len(people)
    observed = sum(p == j for p, j in zip(people, judge, strict=True)) / n
    expected = sum(people.count(label) * judge.count(label) for label in ("A", "B", "tie")) / n**2
    found = validation_of([judgement(outcome) for outcome in outcomes])
    assert found.kappa is not None and found.result.win_rate is not None
    assert found.kappa.value == pytest.approx((observed - expected) / (1 - expected), abs=1e-12)
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.result.win_rate.value == (11 + 2.5) / 20


def test_a_bootstrap_of_many_prompts_agrees_with_the_normal_interval():
    values = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=400, p=[0.3, 0.2, 0.5])
    found = mean_estimate(values)
    reach = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found is not None and found.number == 400
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.006)
    assert mean_estimate(values) == found  # the draws are seeded


def test_few_prompts_never_give_an_interval_that_is_no_number():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (1, 2, 3):
            for values in itertools.product([0.0, 0.5, 1.0], repeat=size):
                for statistic in (np.mean, kappa_with_humans):
                    found = estimate(np.array(values), statistic)
                    assert math.isfinite(found.low) and found.low <= found.value <= found.high
                    if len(set(values)) == 1:
                        assert found.low < found.high


def test_without_spread_the_interval_is_that_of_what_was_not_seen():
    """Twenty wins of twenty: Wilson's upper end for none of twenty is 0.1611."""
    wins, ties = mean_estimate(np.ones(20)), mean_estimate(np.full(20, 0.5))
    assert wins is not None and ties is not None
    assert (wins.low, wins.high) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)
    assert (ties.low, ties.high) == pytest.approx((0.5 - 0.0806, 0.5 + 0.0806), abs=1e-4)
    assert ties.covers(0.5) and not wins.covers(0.5)


def test_the_preference_for_length_is_taken_out():
    """A judge that goes by length alone, and one that goes by quality alone where quality is longer."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(60, 100, size=300).round()
    by_length = (rng.random(300) < 1 / (1 + np.exp(-lengths / 100))).astype(float)
    found = rate_at_equal_length(by_length, lengths)
    assert found is not None and by_length.mean() > 0.58 and found.covers(0.5)
    x = np.tanh(lengths / lengths.std())
    design = np.stack([np.ones(300), x], axis=1)
    (intercept, slope), (residual,), *_ = np.linalg.lstsq(design, by_length, rcond=None)
    error = math.sqrt(residual / 298 * np.linalg.inv(design.T @ design)[0, 0])
    assert found.value == pytest.approx(intercept) and slope > 0.1
    assert (found.high - found.low) / 2 == pytest.approx(1.968 * error, rel=1e-3)  # Student's t, 298 degrees
    by_quality = rate_at_equal_length(np.where(np.arange(300) % 10 < 7, 1.0, 0.0), lengths)
    assert by_quality is not None and by_quality.low > 0.6
    for values, more in ((np.ones(9), lengths[:9]), (by_length[:2], lengths[:2]), (by_length, np.zeros(300))):
        assert rate_at_equal_length(values, more) is None


def test_counts_of_every_kind():
    outcomes = ["win"] * 5 + ["lose"] * 2 + ["tie"] * 3 + ["first"] * 4 + ["second"] + ["half"] * 2 + ["failed"]
    given = [judgement(outcome, "longer" if outcome == "win" else "s", "short") for outcome in outcomes]
    given.append(Judgement(Comparison("same", (), "s", "s"), Order("C"), Order("C"), asked=False))
    found = result_of(given, "student@2", "student@0")
    assert (found.prompts, found.judged, found.failed, found.equal) == (19, 18, 1, 1)
    assert (found.win, found.tie, found.lose) == (5, 11, 2)
    assert (found.both_tie, found.first, found.second, found.half) == (3, 4, 1, 2)
    assert found.consistent == share(10, 17) and found.win_rate.value == (5 + 5.5) / 18
    # 4 x 1 for A and A, 2 x (1/2 + 1) / 2 for one tie and A, a half for each of the ten that agree
    assert found.first_wins.value == pytest.approx((4 + 2 * 0.75 + 10 * 0.5) / 17)
    assert found.longer_wins == share(7, 7) and found.failed_first == (0, 1)
    assert found.sign_test_p == pytest.approx(2 * sum(math.comb(7, k) for k in (0, 1, 2)) / 2**7)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (["win"] * 12 + ["lose"] * 8, "cannot be told from guessing"),
        (["win"] * 18 + ["lose"] * 2, "agrees with people"),
        (["win"] * 2 + ["lose"] * 18, "contradicts people"),
        (["first"] * 20, "cannot be told from guessing"),
        (["failed"], "nothing is known"),
    ],
)
def test_a_validation_says_what_it_shows(outcomes, said):
    assert said in validation_of([judgement(outcome) for outcome in outcomes]).note


def test_results_are_kept_until_the_judge_changes(tmp_path, capsys):
    folder = JudgingFolder(tmp_path, "gpt")
    folder.make()
    about, given = {"model": "m", "temperature": 0.0}, [judgement("win")]
    folder.keep(about, "m", given, result_of(given, "student@1", "student@0"))
    folder.keep(about, "m", given, result_of(given, "student@1", "ceiling@0"))
    folder.keep(about, "m", given, validation_of(given))
    folder.keep(about, "m", given * 2, result_of(given * 2, "student@1", "student@0"))
    kept = read_judging(folder.path / "judging.json")
    assert [(each.opponent, each.prompts) for each in kept.results] == [("ceiling@0", 1), ("student@0", 2)]
    assert kept.validation is not None and not capsys.readouterr().err
    assert len((folder.path / "student@1-vs-student@0.jsonl").read_text().splitlines()) == 4
    assert (folder.path / "human-pairs.jsonl").exists()
    other = folder.keep(about | {"temperature": 1.0}, "m", given, result_of(given, "student@1", "student@0"))
    assert len(other.results) == 1 and other.validation is None
    assert "another temperature" in capsys.readouterr().err
    for text in ("{", "[]", '{"judge": 3}', '{"judge": {}, "results": [{}]}'):
        (folder.path / "judging.json").write_text(text)
        with pytest.raises(DataError):
            read_judging(folder.path / "judging.json")
    assert isinstance(folder.keep(about, "m", given, validation_of(given)), Judging)
    assert "written anew" in capsys.readouterr().err


def test_an_estimate_counts_tokens_and_money():
    found = cost_of(["x" * 41, "y" * 40], known=3, reply_tokens=100)
    assert (found.questions, found.known, found.tokens_in, found.most_tokens_out) == (2, 3, 11 + 10, 200)
    assert found.lines(None) == [
        "2 questions to ask, 3 answered already",
        "21 tokens in (4 characters a token), at most 200 out",
    ]
    priced = cost_of(["x"] * 1000, known=0, reply_tokens=500).lines(Prices(2.0, 10.0))
    assert priced[-1].startswith("at most 5.00 (2 in and 10 out for a million tokens)")
    local = cost_of(["one two"], known=0, reply_tokens=0, count=lambda text: len(text.split()))
    assert local.lines(None)[1] == "2 tokens in (by its tokenizer), none out"
