"""Paired changes over seeds, their t intervals and verdicts."""

from __future__ import annotations

import json
import math

import pytest

from macpo.engine.errors import DataError
from macpo.evaluation.claims import FAILS, HOLDS, MEAN_ONLY, claims, claims_json, claims_table
from macpo.evaluation.intervals import t_central, t_interval, t_quantile
from macpo.evaluation.summary import AgentHistory, build_summary


# standard tables of the two-sided 95% (and 99%) quantile, to their last digit
@pytest.mark.parametrize(
    ("df", "level", "value"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (5, 0.95, 2.5706),
        (9, 0.95, 2.2622),
        (10, 0.95, 2.2281),
        (29, 0.95, 2.0452),
        (30, 0.95, 2.0423),
        (120, 0.95, 1.9799),
        (1, 0.99, 63.6567),
        (4, 0.99, 4.6041),
        (30, 0.99, 2.7500),
    ],
)
def test_t_quantile_equals_the_tables(df, level, value):
    assert t_quantile(df, level) == pytest.approx(value, abs=5.1e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 8, 25])
def test_t_central_is_the_integral_of_the_density(df):
    """Simpson's rule over the density; the two forms share nothing."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps, t = 2000, 2.5
    ys = [scale * (1 + (t * i / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = t / steps / 3 * (ys[0] + ys[-1] + 4 * sum(ys[1:-1:2]) + 2 * sum(ys[2:-1:2]))
    assert t_central(t, df) == pytest.approx(2 * area, abs=1e-10)


def test_t_interval_by_hand():
    mean, low, high = t_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    half = 2.7764451 * math.sqrt(0.025) / math.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert t_interval([0.4]) is None
    with pytest.raises(ValueError, match="df"):
        t_quantile(0)


def run(seed, teacher=(0.5, 0.6), student=(0.6, 0.8), sft=0.7, arm=0.75, with_arm=True):
    def agent(role, values):
        return AgentHistory(role, [{"iteration": i, "gold": v} for i, v in enumerate(values)])

    agents = {
        "teacher0": agent("teacher", teacher),
        "ready": agent("teacher", (0.55,)),
        "student": agent("student", student),
        "filtered-sft": agent("baseline", (sft,)),
    }
    arms = {"own-samples": {"student": agent("student", (0.6, arm)), "teacher0": agent("teacher", teacher)}}
    return build_summary(agents, [], seed, {}, arms=arms if with_arm else None)


def test_every_claim_is_paired_by_seed():
    found = claims([run(200), run(201, teacher=(0.7, 0.65), student=(0.5, 0.9), sft=1.0, arm=0.8)])
    by_kind = {claim.kind: claim for claim in found}
    assert [claim.kind for claim in found] == ["teacher", "naive", "best-teacher", "baseline", "ablation"]
    assert by_kind["teacher"].changes == pytest.approx((0.1, -0.05))
    assert by_kind["naive"].changes == pytest.approx((0.2, 0.4))
    assert by_kind["best-teacher"].changes == pytest.approx((0.25, 0.2))  # .55 (the ready one), then .70
    assert by_kind["baseline"].changes == pytest.approx((0.1, -0.1))
    assert by_kind["ablation"].changes == pytest.approx((0.05, 0.1))
    assert all(claim.seeds == (200, 201) for claim in found)


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ((0.80, 0.81, 0.82), HOLDS),
        ((0.80, 0.95, 0.58), MEAN_ONLY),
        ((0.55, 0.60, 0.50), FAILS),
        ((0.60, 0.60, 0.60), FAILS),  # no change is not a rise
        ((0.80,), MEAN_ONLY),  # one seed has no interval
    ],
)
def test_verdicts(finals, verdict):
    found = claims([run(i, student=(0.6, final)) for i, final in enumerate(finals)])
    naive = next(claim for claim in found if claim.kind == "naive")
    assert naive.verdict == verdict
    assert (naive.interval is None) == (len(finals) == 1)


def test_failing_and_partly_missing_claims_stay_in_the_table_and_the_file():
    runs = [run(1, student=(0.9, 0.5)), run(2, student=(0.9, 0.4), with_arm=False)]
    found = claims(runs)
    text = claims_table(found, "gold")
    assert text.count(FAILS) == 4 and "seeds 1, 2" in text  # all but the teacher's
    assert "final student > ablation own-samples" in text and "0/1" in text
    assert len(text.splitlines()) == 3 + len(found)
    content = json.loads(json.dumps(claims_json(found, runs)))
    assert content["metric"] == "gold" and content["seeds"] == [1, 2]
    assert [row["verdict"] for row in content["claims"]] == [claim.verdict for claim in found]
    ablation = content["claims"][-1]
    assert ablation["seeds"] == [1] and ablation["interval"] is None and ablation["mean"] == pytest.approx(-0.25)


def test_claims_refuse_runs_that_cannot_be_compared():
    other = run(2)
    for agent in other["agents"].values():
        agent["scores"] = [{"iteration": row["iteration"], "preference_accuracy": 0.5} for row in agent["scores"]]
    for runs, problem in (([], "no run"), ([run(1), run(1)], "twice"), ([run(1), other], "one metric")):
        with pytest.raises(DataError, match=problem):
            claims(runs)
