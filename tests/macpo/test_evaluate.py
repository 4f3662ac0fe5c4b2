"""Metrics on held-out prompts and the summary made from them."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macpo.evaluation.gap import gaps_recovered, pgr
from macpo.evaluation.metrics import gold_mean, preference_metrics, response_stats
from macpo.evaluation.prompt_scores import ScoredRun
from macpo.evaluation.summary import AgentHistory, build_summary, headline_metric


def test_response_stats_by_hand():
    stats = response_stats(["a b a b", "a b", " \n"], [True, False, True])
    assert stats["answers"] == 3 and stats["mean_words"] == 2 and stats["finished"] == 2 / 3
    assert stats["empty"] == 1 / 3
    assert stats["distinct_1"] == 2 / 6  # a, b of six words
    assert stats["distinct_2"] == 2 / 4  # ab, ba of ab ba ab | ab: n-grams never span two responses
    assert stats["distinct_3"] == 2 / 2  # aba, bab


def test_response_stats_without_any_response():
    assert response_stats([], []) == {
        "answers": 0,
        **dict.fromkeys(("mean_words", "finished", "empty", "distinct_1", "distinct_2", "distinct_3"), 0),
    }
    with pytest.raises(ValueError, match="2 texts but 1"):
        response_stats(["a", "b"], [True])


def test_preference_metrics_by_hand():
    # implicit rewards, beta 0.5, of chosen minus rejected: +1, -0.5, 0 -> right, wrong, half
    metrics = preference_metrics(
        [-10.0, -10.0, -10.0],
        [-10.0, -10.0, -12.0],
        [-12.0, -10.0, -11.0],
        [-10.0, -11.0, -13.0],
        beta=0.5,
        chosen_tokens=[5, 5, 10],
        rejected_tokens=[5, 10, 12],
    )
    assert metrics["preference_accuracy"] == 0.5 and metrics["preference_pairs"] == 3
    assert metrics["preference_accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert metrics["reward_margin"] == pytest.approx((1 - 0.5 + 0) / 3)
    assert metrics["logp_margin"] == pytest.approx(2 / 3)
    assert metrics["logp_margin_per_token"] == pytest.approx((0 - 1 + 0) / 3)


@given(st.lists(st.tuples(*[st.floats(-1e3, 0)] * 2), min_size=1, max_size=20), st.floats(0.01, 1))
def test_a_base_model_scores_one_half(pairs, beta):
    chosen, rejected = zip(*pairs, strict=True)
    metrics = preference_metrics(chosen, rejected, chosen, rejected, beta=beta)
    assert metrics["preference_accuracy"] == 0.5 and metrics["reward_margin"] == 0


@given(st.lists(st.tuples(*[st.floats(-1e3, 0)] * 4), min_size=1, max_size=20))
def test_swapping_the_labels_mirrors_the_metrics(pairs):
    c, r, bc, br = zip(*pairs, strict=True)
    ours, swapped = preference_metrics(c, r, bc, br, beta=0.1), preference_metrics(r, c, br, bc, beta=0.1)
    assert ours["preference_accuracy"] == pytest.approx(1 - swapped["preference_accuracy"])
    assert ours["reward_margin"] == pytest.approx(-swapped["reward_margin"])
    assert ours["logp_margin"] == pytest.approx(-swapped["logp_margin"])


@pytest.mark.parametrize("bad", [([], [], [], []), ([1.0], [1.0], [1.0], []), ([math.nan], [1.0], [1.0], [1.0])])
def test_preference_metrics_refuse_what_they_cannot_use(bad):
    with pytest.raises(ValueError, match=r"pairs|finite"):
        preference_metrics(*bad, beta=0.1)


def test_gold_mean_has_the_standard_error_of_the_mean():
    scores = [0.0, 0.4, 1.0, 1.0]
    assert gold_mean(scores) == {
        "gold": pytest.approx(0.6),
        "gold_se": pytest.approx(statistics.stdev(scores) / 2),
        "gold_answers": 4,
    }
    assert gold_mean([0.5])["gold_se"] == 0
    with pytest.raises(ValueError, match="no values"):
        gold_mean([])


def test_pgr():
    assert pgr(0.5, 0.75, 1.0) == 0.5 and pgr(0.5, 0.4, 1.0) == pytest.approx(-0.2)
    assert pgr(0.9, 0.95, 0.9) is None and pgr(0.9, 0.95, 0.8) is None


def history(role, *values, **more):
    agent = AgentHistory(role)
    for iteration, value in enumerate(values):
        agent.add(iteration, {"gold": value, **more})
    return agent


def test_summary_follows_the_contract():
    agents = {
        "t0": history("teacher", 0.4, 0.5),
        "t1": history("teacher", 0.6, 0.7),
        "student": history("student", 0.5, 0.9),
        "ceiling": history("ceiling", 1.0),
    }
    arms = {"own": {"student": history("student", 0.5, 0.6)}}
    stages = [{"name": "iter1-student-train", "seconds": 1.5, "tokens": 10}]
    summary = build_summary(agents, stages, 7, {"torch": "2.13"}, arms=arms, title="t")
    assert summary["agents"]["t0"] == {
        "role": "teacher",
        "scores": [{"iteration": 0, "gold": 0.4}, {"iteration": 1, "gold": 0.5}],
    }
    assert summary["stages"] == stages and summary["seed"] == 7 and summary["versions"] == {"torch": "2.13"}
    assert summary["metric"] == "gold" and summary["title"] == "t"
    assert summary["arms"]["own"]["student"]["scores"][1]["gold"] == 0.6
    (gap,) = gaps_recovered([ScoredRun(summary)])
    assert gap["weak"] == 0.5 and gap["weak_agent"] == "mean initial teacher" and gap["ceiling"] == 1.0
    assert [row["value"] for row in gap["student"]] == [pytest.approx(0), pytest.approx(0.8)]


def test_summary_sorts_iterations_and_refuses_broken_ones():
    agent = AgentHistory("student")
    agent.add(1, {"gold": 0.2})
    agent.add(0, {"gold": 0.1})
    assert [row["iteration"] for row in agent.to_json()["scores"]] == [0, 1]
    agent.add(1, {"gold": 0.3})
    with pytest.raises(ValueError, match="twice"):
        agent.to_json()
    with pytest.raises(ValueError, match="gold of iteration 0 is nan"):
        history("student", math.nan).to_json()
    with pytest.raises(ValueError, match="role"):
        AgentHistory("judge").to_json()  # type: ignore[arg-type]


def test_headline_metric_is_one_that_every_agent_has():
    full = history("student", 0.5, 0.6, preference_accuracy=0.7)
    partly = AgentHistory("teacher", [{"iteration": 0, "preference_accuracy": 0.6, "gold": None}])
    both = build_summary({"s": full, "t": partly}, [], 0, {})
    assert both["metric"] == "preference_accuracy"
    assert build_summary({"s": full}, [], 0, {})["metric"] == "gold"
    assert headline_metric({"agents": {}}) is None
    assert gaps_recovered([ScoredRun(both)]) == []  # no ceiling
