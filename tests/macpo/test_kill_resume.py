"""SIGKILL the real method at points in every kind of stage, go on each time, and end with the same bits."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forks import forked
from standalone_runs import content
from tiny import tiny

from macpo.commands.run import run
from macpo.config import Recipe
from macpo.engine import faults
from macpo.engine.run.executor import Executor
from macpo.engine.run.stages import Stage


def recipe(folder: Path, jobs: int = 1) -> Recipe:
    made = tiny(folder, iterations=1)
    return made.model_copy(update={"compute": made.compute.model_copy(update={"jobs": jobs})})


KILLS = (  # in the order of the graph: stage, write point, how often it is passed inside that stage
    ("data", "file-renamed", 3),
    ("base-teacher0", "checkpoint-shards", 1),
    ("base-teacher0", "checkpoint-manifest", 2),
    ("init-teacher0-positive", "checkpoint-renamed", 1),
    ("init-teacher0-negative", "stage-ran", 1),
    ("init-teacher0-answer", "file-written", 3),
    ("init-teacher0-bad-answer", "file-renamed", 3),
    ("init-teacher1-positive", "stage-hashed", 1),
    ("init-weak-labels", "file-synced", 2),
    ("init-weak-negatives", "stage-started", 1),
    ("base-student", "file-created", 4),
    ("eval-student-base", "stage-manifest", 1),
    ("eval-student-iter0", "file-written", 2),
    ("iter1-student-score", "file-created", 2),
    ("iter1-student-select", "stage-unmarked", 1),
    ("iter1-student-train", "checkpoint-shards", 1),
    ("iter1-student-answer", "stage-renamed", 1),
    ("iter1-teacher0-pairs", "stage-created", 1),
    ("iter1-teacher1-train", "stage-committed", 1),
    ("ceiling", "file-written", 2),
)


def test_killed_in_every_kind_of_stage_ends_with_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def until(target: str, point: str, count: int) -> None:
        """Run with a kill that is armed when the stage `target` begins."""
        execute = Executor.execute

        def armed(self: Executor, stage: Stage, digests: Mapping[str, str]) -> dict[str, Any]:
            if stage.name == target:
                faults._passed.clear()
                os.environ["MACPO_KILL_AT"] = f"{point}:{count}"
            return execute(self, stage, digests)

        Executor.execute = armed  # type: ignore[method-assign]  # in a forked child only
        run(recipe(folder))

    for kill in KILLS:
        assert forked(functools.partial(until, *kill)) == -signal.SIGKILL, kill
    assert forked(lambda: run(recipe(folder))) == 0
    assert content(folder) == content(tiny_run)


def test_parallel_jobs_give_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert forked(lambda: run(recipe(folder, jobs=2))) == 0
    assert content(folder) == content(tiny_run)
