"""How far training or generation is: a live bar on a terminal, a plain line now and then where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS, LIVE_SECONDS = 30.0, 0.1


class _Shown:
    """A bar on standard error, or plain lines.

    No thread draws it, so nothing appears between updates, and a process may fork while it is shown. What others print
    goes above the bar. A terminal with TERM=dumb gets plain lines.
    """

    def __init__(self, label: str, *, done: int, total: int, text: str, fields: dict[str, str]) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(f"{text} · ETA", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            disable=not self._live,
        )
        self._task = self._bar.add_task(label, total=total, completed=done, **fields)  # type: ignore[arg-type]
        self._shown = time.monotonic()
        self._bar.start()

    def _update(self, done: int, line: str, *, last: bool, fields: dict[str, str]) -> None:
        """Shows it where it is time to, or the `last` time; `line` is what a file gets."""
        self._bar.update(self._task, completed=done, **fields)  # type: ignore[arg-type]
        now = time.monotonic()
        if not last and now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        if self._live:
            self._bar.refresh()
            return
        left = self._bar.tasks[0].time_remaining
        eta = "" if left is None or last else f" ETA {timedelta(seconds=round(left))}"
        self._console.file.write(f"{line}{eta}\n")
        self._console.file.flush()

    def close(self) -> None:
        """The terminal is as it was; the bar's last state stays on it."""
        self._bar.stop()


class TrainingProgress(_Shown):
    """Loss, speed and time left of one stage.

    Args:
        label: what is being trained.
        done, planned: optimiser steps.
    """

    def __init__(self, label: str, *, done: int, planned: int) -> None:
        self._label, self._planned = label, planned
        text = "loss {task.fields[loss]} · {task.fields[rate]} tok/s"
        super().__init__(label, done=done, total=planned, text=text, fields={"loss": "–", "rate": "–"})

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Call it once a step."""
        line = f"{self._label}: step {step}/{self._planned} loss {loss:.4f} {tokens_per_s:.0f} tok/s"
        fields = {"loss": f"{loss:.4f}", "rate": f"{tokens_per_s:,.0f}"}
        self._update(step, line, last=step >= self._planned, fields=fields)


class GenerationProgress(_Shown):
    """Answers that have ended, tokens a second and time left.

    Args:
        label: what is being written.
        done, planned: answers; those that are done when it starts were not written now.
    """

    def __init__(self, label: str, *, done: int, planned: int) -> None:
        self._label, self._done, self._planned = label, done, planned
        self._tokens, self._began = 0, time.monotonic()
        super().__init__(
            label, done=done, total=planned, text="answers · {task.fields[rate]} tok/s", fields={"rate": "–"}
        )

    def add(self, answers: int = 0, tokens: int = 0) -> None:
        """So many more; answers count when they end, tokens when they are there."""
        self._done, self._tokens = self._done + answers, self._tokens + tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        line = f"{self._label}: {self._done}/{self._planned} answers {rate:.0f} tok/s"
        self._update(self._done, line, last=False, fields={"rate": f"{rate:,.0f}"})


class Count(Protocol):
    """`GenerationProgress.add`, or what takes its place."""

    def __call__(self, answers: int = 0, tokens: int = 0) -> None: ...


def uncounted(answers: int = 0, tokens: int = 0) -> None:
    """Shows nothing."""


@contextmanager
def counted(progress: Count | str | bool, planned: int, done: int = 0) -> Iterator[Count]:
    """Where to count: a caller's own place, a display with this label, closed at the end, or nowhere (False)."""
    if not isinstance(progress, str | bool):
        yield progress
    elif progress is False:
        yield uncounted
    else:
        shown = GenerationProgress("generate" if progress is True else progress, done=done, planned=planned)
        try:
            yield shown.add
        finally:
            shown.close()
