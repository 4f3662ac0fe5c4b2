"""How far training is: a live bar on a terminal, a plain line now and then where nobody watches."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS, LIVE_SECONDS = 30.0, 0.1


class TrainingProgress:
    """Loss, speed and time left of one stage, on standard error.

    No thread draws it, so nothing appears between steps, and a process may fork while it is shown. What others print
    goes above the bar. A terminal with TERM=dumb gets plain lines.

    Args:
        label: what is being trained.
        done, planned: optimiser steps.
    """

    def __init__(self, label: str, *, done: int, planned: int) -> None:
        self._label, self._done, self._planned = label, done, planned
        console = Console(stderr=True)
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[rate]} tok/s · ETA", markup=False),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            disable=not self._live,
        )
        self._task = self._bar.add_task(label, total=planned, completed=done, loss="–", rate="–")
        self._console = console
        self._shown = time.monotonic()
        self._bar.start()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Call it once a step."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_s:,.0f}")
        now = time.monotonic()
        if step < self._planned and now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        if self._live:
            self._bar.refresh()
            return
        left = self._bar.tasks[0].time_remaining
        eta = "" if left is None or step == self._planned else f" ETA {timedelta(seconds=round(left))}"
        line = f"{self._label}: step {step}/{self._planned} loss {loss:.4f} {tokens_per_s:.0f} tok/s{eta}"
        self._console.file.write(line + "\n")
        self._console.file.flush()

    def close(self) -> None:
        """The terminal is as it was; the bar's last state stays on it."""
        self._bar.stop()
