"""What a person sees of real runs: on a terminal, in a log, and when a run is resumed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import Terminal
from standalone_runs import recipe_of

DONE = re.compile(r"\[\d/6\] ([\w-]+) done in \d+\.\d s( \([\d,]+ tokens\))?")
EVERY_30_S = re.compile(r"\d of 6 stages, \d+ (s|min) so far, (time left: …|\d+ (s|min) left)(; [\w-]+: [^;{}]+)*")
STAGES = ["data", "base-policy", "reference", "eval-policy-iter0", "train-policy", "eval-policy-iter1"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A preference recipe of six stages."""
    made = recipe_of("preference", None, tmp_path / "run", training={"learning_rate": 1e-3, "batch": 2, "epochs": 3})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return path


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "macpo", "run", str(recipe), *more]


def in_a_pipe(recipe: Path, *more: str, environment: dict[str, str] | None = None) -> list[str]:
    done = subprocess.run(
        command(recipe, *more),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        check=False,
        timeout=300,
    )
    assert not re.search(r"[\r\x1b━─]", done.stderr), "no bar and no control in a log"
    assert not re.search(r"[{}]|\bobject at 0x|\(\d+, ", done.stderr), "no dict, tuple or repr"
    return done.stderr.splitlines()


def test_a_log_has_a_line_for_each_stage_and_a_resumed_run_says_where_it_goes_on(recipe: Path) -> None:
    """Killed in the middle of training, at its second checkpoint."""
    settings = ["--set", "training.save_every_steps=4"]
    lines = in_a_pipe(recipe, *settings, environment={"MACPO_KILL_AT": "checkpoint-renamed:6"})
    assert [match[1] for line in lines if (match := DONE.fullmatch(line))][:2] == STAGES[:2]
    lines = in_a_pipe(recipe, *settings)
    assert lines.pop(0).startswith("cleared the lock that process "), lines
    assert re.fullmatch(r"resuming: [23456] of 6 stages done, \d+ s of work; next .*", lines[0]), lines
    assert "train-policy from step " in lines[0] and " of 48" in lines[0], lines
    assert all(DONE.fullmatch(line) or EVERY_30_S.fullmatch(line) for line in lines[1:]), lines
    lines = in_a_pipe(recipe, *settings)
    assert lines == ["all 6 stages are done already, nothing to do (--from STAGE redoes some)"]


def test_a_terminal_shows_steps_speed_and_loss_and_ends_with_stages_and_scores(recipe: Path) -> None:
    """Of stages that run two at once."""
    shown = Terminal(
        command(recipe, "--set", "compute.jobs=2"), columns=110, environment={"OMP_NUM_THREADS": "1"}, seconds=300
    )
    assert shown.code == 0 and shown.unchanged, shown.raw
    stages = [match[1] for line in shown.lines if (match := DONE.fullmatch(line))]
    assert sorted(stages) == sorted(STAGES)
    assert shown.lines[len(stages)].startswith("preference accuracy by iteration"), "nothing else is left above it"
    live = {line.rstrip() for picture in shown.pictures for line in picture}
    job = re.compile(
        r"(base|train)-policy +(pretrains|preference training) +step \d+/\d+  [\d,]+ tok/s  loss \d\.\d{4}.*"
    )
    assert any(job.fullmatch(line) for line in live), live
    assert any(re.fullmatch(r"\d of 6 stages  [━─]{24}  \d+%  \d+ s  (time left: …|\d+ s left)", line) for line in live)
