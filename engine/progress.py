"""Progress of training or generation: a live bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from macpo.engine.errors import printable

PLAIN_SECONDS, LIVE_SECONDS = 30.0, 0.1


class _Shown:
    """A bar on standard error, or plain lines.

    No thread draws it, so nothing appears between updates, and a process may fork while it is shown. Other output
    goes above the bar. A terminal with TERM=dumb gets plain lines.
    """

    def __init__(self, label: str, *, done: int, total: int, text: str, fields: dict[str, str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        self._task = self._bar.add_task(printable(label), total=total, completed=done, **fields)  # type: ignore[arg-type]
        self._shown = time.monotonic()
        self._bar.start()

    def _update(self, done: int, line: str, *, last: bool, fields: dict[str, str]) -> None:
        """Show the state if enough time has passed, or for the `last` time; `line` is the plain form."""
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
        self._console.file.write(printable(f"{line}{eta}") + "\n")
        self._console.file.flush()

    def close(self) -> None:
        """Restore the terminal; the bar's last state stays visible."""
        self._bar.stop()


class TrainingProgress(_Shown):
    """Shows loss, speed and time left of one training stage.

    Args:
        label: name of the stage.
        done, planned: optimiser steps.
    """

    def __init__(self, label: str, *, done: int, planned: int) -> None:
        self._label, self._planned = label, planned
        text = "loss {task.fields[loss]} · {task.fields[rate]} tok/s"
        super().__init__(label, done=done, total=planned, text=text, fields={"loss": "–", "rate": "–"})

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show a step; call it once per step."""
        line = f"{self._label}: step {step}/{self._planned} loss {loss:.4f} {tokens_per_s:.0f} tok/s"
        fields = {"loss": f"{loss:.4f}", "rate": f"{tokens_per_s:,.0f}"}
        self._update(step, line, last=step >= self._planned, fields=fields)


class GenerationProgress(_Shown):
    """Shows finished responses, tokens per second and time left.

    Args:
        label: name of what is generated.
        done, planned: numbers of responses; those done at the start do not count for the speed.
    """

    def __init__(self, label: str, *, done: int, planned: int) -> None:
        self._label, self._done, self._planned = label, done, planned
        self._tokens, self._began = 0, time.monotonic()
        super().__init__(
            label, done=done, total=planned, text="answers · {task.fields[rate]} tok/s", fields={"rate": "–"}
        )

    def add(self, answers: int = 0, tokens: int = 0) -> None:
        """Add finished responses and generated tokens."""
        self._done, self._tokens = self._done + answers, self._tokens + tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        line = f"{self._label}: {self._done}/{self._planned} answers {rate:.0f} tok/s"
        self._update(self._done, line, last=False, fields={"rate": f"{rate:,.0f}"})


class RowProgress(_Shown):
    """Shows how many rows are read.

    Args:
        label: what is read.
        planned: number of rows.
    """

    def __init__(self, label: str, planned: int) -> None:
        self._label, self._planned = label, planned
        super().__init__(label, done=0, total=planned, text="rows", fields={})

    def update(self, done: int) -> None:
        """Show the number of rows that are done."""
        self._update(done, f"{self._label}: {done:,}/{self._planned:,} rows", last=False, fields={})


class Count(Protocol):
    """`GenerationProgress.add` or a function with the same signature."""

    def __call__(self, answers: int = 0, tokens: int = 0) -> None: ...


def uncounted(answers: int = 0, tokens: int = 0) -> None:
    """Show nothing."""


@contextmanager
def counted(progress: Count | str | bool, planned: int, done: int = 0) -> Iterator[Count]:
    """The function to count with: the caller's own, a labelled display's, or one that shows nothing (False)."""
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
