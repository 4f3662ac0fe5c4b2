"""`torchrun engine/train.py` on two gloo ranks runs the recipe that one process runs, with the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import torchrun
from tiny import tiny

from macpo.engine.files import read_jsonl
from macpo.engine.recipe import dump
from macpo.engine.run.folder import folder_of

ROOT = Path(__file__).parents[2]


def test_two_ranks_run_the_method_as_one_process_does(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    made = tiny(tmp_path / "two", iterations=1)
    jobs = made.compute.model_copy(update={"jobs": 2})  # a laptop's recipe; ranks take its place
    recipe.write_text(dump(made.model_copy(update={"compute": jobs})))
    ended = torchrun(recipe)
    assert ended.returncode == 0, ended.stderr[-2000:]

    for stage in ("base-student", "init-teacher1-positive", "iter1-student-train"):
        losses = [
            [row["loss"] for _, row in read_jsonl(folder_of(run_dir, stage) / "metrics.jsonl")]
            for run_dir in (tiny_run, tmp_path / "two")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), stage
    summaries = [json.loads((run_dir / "summary.json").read_text()) for run_dir in (tiny_run, tmp_path / "two")]
    for agent in ("teacher0", "teacher1", "student"):
        first, second = (summary["agents"][agent]["scores"] for summary in summaries)
        assert [row["iteration"] for row in first] == [row["iteration"] for row in second] == [0, 1]
        margins = [[row["reward_margin"] for row in rows] for rows in (first, second)]
        assert margins[0] == pytest.approx(margins[1], abs=1e-3)
    assert (tmp_path / "two" / "report.html").exists()


def test_an_error_is_one_line_under_torchrun_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny(tmp_path / "run")).replace("iterations: 2", "iterations: -2"))
    ended = torchrun(recipe)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "iterations" in said[0]
