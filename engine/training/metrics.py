"""The logs of training: metrics.jsonl (the same bytes every time), timing.jsonl, progress, trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from macpo.engine.errors import IntegrityError
from macpo.engine.files import explained, fsync_dir, sha256
from macpo.engine.progress import Progress
from macpo.engine.training.throughput import Meter
from macpo.engine.training.trackers import Trackers, Training


class MetricsLog:
    """Append-only logs of one training stage, with one row per step in each of two files.

    metrics.jsonl holds what seed and data determine and is part of the stage's result; timing.jsonl holds the speed:
    seconds (of the step alone), save_seconds (of the checkpoint before it) and the values of `Meter.rates`.

    Args:
        workdir: folder of metrics.jsonl and timing.jsonl.
        step: training resumes after this step: later rows and a torn last line are cut off.
        planned: number of steps in all.
        progress: label of the display on standard error; None is silent.
        trackers: are sent every row, after metrics.jsonl has it.
        meter: measures rates of a step; without it only seconds are logged.
        training: what trackers are told about it.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        planned: int,
        progress: str | None = None,
        trackers: Trackers | None = None,
        meter: Meter | None = None,
        training: Training | None = None,
    ) -> None:
        with explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "timing.jsonl"):
                cut(workdir / name, step)
            # line by line, so that trackers, which read the files, lag no more than a step
            self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
            self._timing = open(workdir / "timing.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            fsync_dir(workdir)
        self._folder = workdir
        self._meter = meter
        if meter is not None:
            meter.reset()
        self._trackers = trackers
        if trackers is not None:
            trackers.start(workdir, training or Training(), finished=step == planned)
        self._progress = Progress(progress, "step", planned, done=step, last=True) if progress is not None else None
        self._save_seconds = 0.0
        self._last = time.perf_counter()

    def write(self, row: Mapping[str, Any], indices: Sequence[int] = ()) -> None:
        """Write a step's row, which has the keys step, tokens and loss; `indices` are the step's groups."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        timing: dict[str, Any] = {"step": row["step"], "seconds": round(seconds, 6)}
        if self._save_seconds:
            timing["save_seconds"], self._save_seconds = round(self._save_seconds, 6), 0.0
        if self._meter is not None:
            timing |= self._meter.rates(indices, seconds)
        with explained(self._folder):
            self._timing.write(json.dumps(timing) + "\n")  # first, so a reader of metrics finds timing
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        if self._trackers is not None:
            self._trackers.watch()
        if self._progress is not None:
            self._progress.update(row["step"], tokens_per_s=row["tokens"] / max(seconds, 1e-9), loss=row["loss"])

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context in which a checkpoint is written; its time does not count for the next step."""
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        self._save_seconds += now - began
        self._last += now - began

    def sync(self) -> None:
        """Sync what was written to disk; called before a checkpoint is committed."""
        with explained(self._folder):
            for file in (self._metrics, self._timing):
                file.flush()
                os.fsync(file.fileno())

    def close(self, *, at_once: bool = False) -> None:
        """Close files, progress and trackers; with `at_once`, do not wait for trackers."""
        if self._progress is not None:
            self._progress.close()
        with explained(self._folder):
            self._metrics.close()
            self._timing.close()
        if self._trackers is not None:
            self._trackers.close(at_once=at_once)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None and not issubclass(kind, Exception))  # a second Ctrl-C waits for nobody


def verify(workdir: Path, step: int, digest: str) -> None:
    """Cut metrics.jsonl behind `step`, and raise IntegrityError unless it is what it was when that step was saved.

    It is a part of the stage's result, and a checkpoint does not hold it.
    """
    path = workdir / "metrics.jsonl"
    cut(path, step)
    if not path.is_file() or sha256(path) != digest:
        fix = f"delete {workdir} to train this stage again"
        raise IntegrityError(f"metrics.jsonl is not as it was when step {step} was saved", fix, file=path)


def cut(path: Path, step: int) -> None:
    """Keep the rows up to and including `step`; cut later ones and a torn line."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the kill came in the middle of a line
                break
            last = row.get("step") if isinstance(row, dict) else None
            if not line.endswith(b"\n") or not isinstance(last, int) or last > step:
                break
            kept += len(line)
        file.truncate(kept)
