"""What the tables of evidence are made of: no score is lost on the way to a file, and the table says what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from bench.evidence import paper_claims, runs, world_gates
from macpo.commands.compare import compare, comparison_of
from macpo.evaluation.prompt_scores import Policy, ScoredRun
from macpo.report.run_reader import RunReader


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("evidence")
    world = tiny(top).data.world
    assert world is not None
    data = {"world": world.model_copy(update={"dev_prompts": 6}).model_dump()}
    parts = {"own-positives": {"positives.source": "own"}, "weak-negatives": {"negatives.source": "other"}}
    recipe = tiny(top / "out", data=data, iterations=1, ablations=parts)
    compare(comparison_of(recipe, (1, 2), methods=["filtered-sft"], k_curve=[1]))
    return top / "out"


def test_a_runs_file_holds_every_score(compared: Path, tmp_path: Path) -> None:
    path = runs.write(compared / "seed-1", tmp_path)
    kept, run = runs.read(path), RunReader(compared / "seed-1").scored
    assert kept.scores is not None and run.scores is not None
    policies = [Policy("", "student", 1), Policy("own-positives", "student", 1), Policy("", "teacher1", 0)]
    for scored in (kept.scores, run.scores):
        scored.read(policies)
    np.testing.assert_allclose(kept.scores.columns(policies), run.scores.columns(policies), atol=1e-6)
    np.testing.assert_array_equal(kept.scores.words(policies), run.scores.words(policies))
    assert kept.summary["agents"] == run.summary["agents"]
    assert path.stat().st_size < 40_000


def test_the_table_says_what_the_runs_say(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([str(compared / "seed-1"), str(compared / "seed-2"), "--out", str(tmp_path)])
    found = paper_claims.main([str(tmp_path), "--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")])
    by_question = {row.question: row for row in found}
    summaries = [json.loads((compared / f"seed-{seed}" / "summary.json").read_text()) for seed in (1, 2)]

    def last(summary: dict, arm: str) -> float:
        return summary["arms"][arm]["student"]["scores"][-1]["gold"]

    main = [summary["agents"]["student"]["scores"][-1]["gold"] for summary in summaries]
    arms = {
        "hard above weak negatives": "weak-negatives",
        "mutual above own positives": "own-positives",
        "above filtered labels and SFT": "filtered-sft",
    }
    for question, arm in arms.items():
        row = by_question[question]
        changes = [one - last(summary, arm) for one, summary in zip(main, summaries, strict=True)]
        assert list(row.by_seed.values()) == pytest.approx(changes)
        assert row.difference.value == pytest.approx(sum(changes) / 2)
    dev = [max(s["development"], key=lambda name, s=s: s["development"][name]["gold"]) for s in summaries]
    best = [s["agents"][name]["scores"][0]["gold"] for s, name in zip(summaries, dev, strict=True)]
    assert by_question["final student above the best initial teacher"].other == pytest.approx(sum(best) / 2)
    assert {"2 above 1 teacher, naive", "2 above 1 teacher, round 1"} <= set(by_question)
    text = (tmp_path / "t.md").read_text()
    assert all(f"| {question} |" in text for question in by_question) and text in capsys.readouterr().out
    ends = [agent["scores"] for s in summaries for agent in s["agents"].values() if agent["role"] == "teacher"]
    risen = sum(scores[1]["gold"] > scores[0]["gold"] for scores in ends)
    assert f"| teachers above their own start |  | {risen} of {len(ends)} |" in text
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["seeds"] == [1, 2] and len(written["answers"]) == len(found)


def test_verdicts_need_interval_and_adjusted_p() -> None:
    def answer(low: float, high: float, p: float) -> paper_claims.Answer:
        return paper_claims.Answer("q", 0.5, 0.4, paper_claims.Estimate(0.1, low, high, p), p, {1: 0.1})

    assert answer(0.05, 0.15, 0.01).verdict == "holds"
    assert answer(0.05, 0.15, 0.2).verdict == "not shown"
    assert answer(-0.05, 0.15, 0.01).verdict == "not shown"
    assert answer(-0.15, -0.05, 0.01).verdict == "the opposite holds"


def test_stopping_goes_by_human_pairs_alone() -> None:
    rows = [{"gold": 0.2, "preference_accuracy": 0.6}, {"gold": 0.7, "preference_accuracy": 0.9}]
    rows.append({"gold": 0.9, "preference_accuracy": 0.9})
    falls = [{"gold": 0.8, "preference_accuracy": 0.7}, {"gold": 0.5, "preference_accuracy": 0.4}]
    agents = {
        "s": {"role": "student", "scores": rows},
        "a": {"role": "teacher", "scores": falls},
        "b": {"role": "teacher", "scores": rows},
    }
    seed = paper_claims.Seed(ScoredRun({"agents": agents, "metric": "gold", "seed": 1}))
    assert seed.stopped(["s"]) == 0.7 and seed.stopped(seed.teachers) == pytest.approx((0.8 + 0.7) / 2)
    assert seed.student() == 0.9 and seed.teachers_mean() == pytest.approx((0.5 + 0.9) / 2)


def test_gates_of_a_run(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of a second of training copies nothing, and the run's gates say so."""
    assert (
        world_gates.main([str(compared / "seed-1"), str(compared / "seed-1"), "--json", str(tmp_path / "g.json")]) == 1
    )
    assert "NOT passed" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "g.json").read_text())["runs"]
    summary = json.loads((compared / "seed-1" / "summary.json").read_text())
    assert run["naive"] == summary["agents"]["student"]["scores"][0]["gold"]
    assert set(run["copying"]) == {"teacher0", "teacher1", "student"} and max(run["copying"].values()) < 0.5


def test_copying_is_judged_without_the_verdict() -> None:
    assert (
        world_gates.without_verdict("that is fine . emma asks how to cook the soup .")
        == "emma asks how to cook the soup ."
    )
    assert world_gates.without_verdict("emma") == ""
