"""What work reports of itself while it runs.

Whoever works makes a `Progress`. Its reports go to the display of the run (`shown_by`), or to one of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from macpo.engine.console import Display, Field, Line

BAR = 24
"""Characters of a bar."""


@dataclass(frozen=True, slots=True)
class Report:
    """How far one piece of work is.

    Attributes:
        unit: what is counted: `step`, `responses`, …
        since: how many were done when this attempt began.
        tokens_per_s: None where no tokens are counted.
        last: whether the stage has nothing else to do after it.
    """

    unit: str
    done: int
    total: int
    since: int = 0
    tokens_per_s: float | None = None
    loss: float | None = None
    last: bool = False

    def __str__(self) -> str:
        if self.unit == "step":
            return f"step {self.done:,}/{self.total:,}"
        return f"{self.done:,}/{self.total:,} {self.unit}"


class Pace:
    """How fast one piece of work goes on, by its first report and its latest."""

    def __init__(self, first: Report, now: float) -> None:
        self.report, self._began, self._latest = first, now, now

    def goes_on_with(self, report: Report) -> bool:
        """Whether the report is of the same work."""
        before = self.report
        return (report.unit, report.total) == (before.unit, before.total) and report.done >= before.done

    def add(self, report: Report, now: float) -> None:
        if report.done != self.report.done:
            self._latest = now
        self.report = report

    @property
    def share(self) -> float:
        """Of the whole work, what was done since the first report."""
        return (self.report.done - self.report.since) / max(1, self.report.total)

    @property
    def seconds(self) -> float:
        """From the first report to the latest count."""
        return self._latest - self._began

    def left(self, now: float) -> float | None:
        """Seconds to the end of the work; None where nothing of it is done yet."""
        if self.share <= 0:
            return None
        whole = self.seconds / self.share
        return max(0.0, whole * (1 - self.report.done / max(1, self.report.total)) - (now - self._latest))


class Sink(Protocol):
    """What shows reports."""

    def report(self, report: Report) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Reports one piece of work.

    Args:
        label: what a display of its own calls it.
        unit, total, last: as in a Report.
        done: how much is done at the start; it does not count for the speed.
        leave: whether the last state of a display of its own stays visible.
    """

    def __init__(
        self, label: str, unit: str, total: int, *, done: int = 0, last: bool = False, leave: bool = True
    ) -> None:
        self._unit, self._total, self._since, self._last = unit, total, done, last
        self._done, self._tokens, self._began = done, 0, time.monotonic()
        self._sink: Sink = _sinks[-1] if _sinks else _Alone(label, leave)
        self.update(done)

    def update(self, done: int, *, tokens_per_s: float | None = None, loss: float | None = None) -> None:
        """Report how much is done in all."""
        self._done = done = min(done, self._total)
        report = Report(self._unit, done, self._total, self._since, tokens_per_s, loss, self._last)
        self._sink.report(report)

    def add(self, done: int = 0, tokens: int = 0) -> None:
        """Report how much more is done, and tokens for it."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self.update(self._done + done, tokens_per_s=rate if self._tokens else None)

    def close(self) -> None:
        """End a display of its own."""
        if self._sink not in _sinks:
            self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_sinks: list[Sink] = []


@contextmanager
def shown_by(sink: Sink) -> Iterator[None]:
    """Context in which this process's work reports to `sink`."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


class Count(Protocol):
    """`Progress.add` or a function with the same signature."""

    def __call__(self, done: int = 0, tokens: int = 0) -> None: ...


def uncounted(done: int = 0, tokens: int = 0) -> None:
    """Show nothing."""


@contextmanager
def counted(progress: Count | str | bool, planned: int, done: int = 0, unit: str = "responses") -> Iterator[Count]:
    """The function to count with: the caller's own, a labelled display's, or one that shows nothing (False)."""
    if not isinstance(progress, str | bool):
        yield progress
    elif progress is False:
        yield uncounted
    else:
        with Progress("generate" if progress is True else progress, unit, planned, done=done) as shown:
            yield shown.add


def duration(seconds: float) -> str:
    """A time in words, short and as exact as a person needs it: `8 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(round(seconds / 600) * 10, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def bar(share: float, size: int = BAR) -> str:
    """A bar of so many characters that needs no colour."""
    full = min(size, max(0, int(share * size)))
    return "━" * full + "─" * (size - full)


def described(report: Report) -> list[Field]:
    """A report's fields."""
    fields = [Field(str(report), style="cyan")]
    if report.tokens_per_s is not None:
        fields.append(Field(f"{report.tokens_per_s:,.0f} tok/s", 3))
    if report.loss is not None:
        fields.append(Field(f"loss {report.loss:.4f}", 1))
    return fields


class _Alone:
    """The display of one piece of work that no run shows."""

    def __init__(self, label: str, leave: bool) -> None:
        self._label, self._leave = label, leave
        self._pace: Pace | None = None
        self._display = Display(self._picture, self._line)

    def report(self, report: Report) -> None:
        now = time.monotonic()
        if self._pace is None:
            self._pace = Pace(report, now)
            self._display.start()
        self._pace.add(report, now)

    def close(self) -> None:
        self._display.close(leave=self._leave)

    def _picture(self) -> list[Line]:
        assert self._pace is not None
        report = self._pace.report
        shown = bar(report.done / max(1, report.total))
        return [[Field(self._label), Field(shown, 1, "green"), *described(report), *self._left()]]

    def _line(self) -> str:
        assert self._pace is not None
        return f"{self._label}: " + ", ".join(field.text for field in (*described(self._pace.report), *self._left()))

    def _left(self) -> list[Field]:
        assert self._pace is not None
        left = self._pace.left(time.monotonic())
        return [] if left is None or self._pace.report.done >= self._pace.report.total else [_left(left)]


def _left(seconds: float) -> Field:
    return Field(f"{duration(seconds)} left", 4)
