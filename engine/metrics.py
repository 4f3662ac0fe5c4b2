"""What training writes while it runs: metrics.jsonl (the same bytes every time), timing.jsonl, a progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from macpo.engine.files import explained, fsync_dir
from macpo.engine.trackers import Trackers


class MetricsLog:
    """Append-only logs of one training stage, a row a step.

    Args:
        workdir: where metrics.jsonl and timing.jsonl are.
        step: rows after this step, and a torn last line, are cut off: training goes on from there.
        progress: label of a line on standard error now and then; None is silent.
        planned: steps in all, for that line.
        trackers: get every row too; metrics.jsonl is written first.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        planned: int,
        progress: str | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._trackers = trackers
        self._planned = planned
        self._label = progress
        with explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "timing.jsonl"):
                cut(workdir / name, step)
            self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            self._timing = open(workdir / "timing.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            fsync_dir(workdir)
        self._folder = workdir
        self._last = self._shown = time.perf_counter()

    def write(self, row: Mapping[str, Any]) -> None:
        """One step's row; needs the keys step, tokens and loss."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = row["tokens"] / max(seconds, 1e-9)
        timing = {"step": row["step"], "seconds": round(seconds, 6), "tokens_per_s": round(rate, 1)}
        with explained(self._folder):
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self._timing.write(json.dumps(timing) + "\n")
        if self._trackers is not None:
            self._trackers.log(row["step"], {k: v for k, v in row.items() if k != "step"})
        if self._label is not None and (now - self._shown > 10 or row["step"] == self._planned):
            self._shown = now
            where = f"step {row['step']}/{self._planned}"
            print(f"{self._label}: {where} loss {row['loss']:.4f} {rate:.0f} tok/s", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Everything written so far is on disk; called before a checkpoint is committed."""
        with explained(self._folder):
            for file in (self._metrics, self._timing):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        with explained(self._folder):
            self._metrics.close()
            self._timing.close()
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut(path: Path, step: int) -> None:
    """Keep the leading rows up to and including `step`; later ones and a torn line go."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # the kill came in the middle of a line
                break
            if not line.endswith(b"\n") or row["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)
