"""How far a run is: stages done, what each job does, and the time left to the end of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from macpo.engine.console import Display, Field, Line
from macpo.engine.processes import STOPPING, StopFlag
from macpo.engine.progress import Pace, Report, bar, described, duration
from macpo.engine.run.stages import Graph
from macpo.engine.run.time_left import Planned, TimeLeft, UnderWay, stage_left


@dataclass(frozen=True, slots=True)
class Part:
    """A run as one of several that are done one after the other, such as those of several seeds.

    Attributes:
        label: what this one is called.
        number: from 1.
    """

    label: str
    number: int
    of: int


@dataclass
class _Job:
    """A running stage."""

    began: float
    process: int
    fresh: bool
    """Whether its process still has to import what models need."""
    pace: Pace | None = None

    def under_way(self, planned: float, now: float) -> UnderWay:
        elapsed = now - self.began
        if self.pace is None:
            return UnderWay(elapsed)
        last, left = self.pace.report.last, self.pace.left(now)
        seen = (planned * self.pace.share, self.pace.seconds) if last and left is not None else (0.0, 0.0)
        return UnderWay(elapsed, left, last, seen)


class RunProgress:
    """Shows a run, and is what its stages report to.

    On a terminal its lines stay at the bottom, else one line tells the same every 30 s.

    Args:
        planned: what the stages were planned to take, where that is known.
        jobs: how many run at once.
        part: the run's place among several.
        write: gets plain lines; None shows a terminal what it can show.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        planned: Mapping[str, Planned] | None = None,
        jobs: int = 1,
        part: Part | None = None,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._graph, self._part, self._clock = graph, part, clock
        self._time = TimeLeft(graph, planned, jobs)
        self._done: set[str] = set()
        self._jobs: dict[str, _Job] = {}
        self._warm: set[int] = set()
        """Processes in which a stage has worked with a model."""
        self._began = clock()
        self._stop: StopFlag | None = None
        self._lock = threading.Lock()
        self.display = Display(self.picture, self.line, write=write, clock=clock)

    # --- what the runner tells ---

    def start(self, done: Collection[str], stop: StopFlag) -> None:
        """Show it from now on; `done` were finished before."""
        with self._lock:
            self._done, self._began = set(done), self._clock()
        self._stop, stop.quiet = stop, stop.quiet or self.display.live
        self.display.start()

    def keep(self, name: str) -> None:
        """A stage is found to be done, which may have looked stale before its inputs were made again."""
        with self._lock:
            self._done.add(name)

    def begin(self, name: str, process: int = 0) -> None:
        """A stage begins, in one of the processes that run them."""
        with self._lock:
            self._jobs[name] = _Job(self._clock(), process, process not in self._warm)

    def of_stage(self, name: str, report: Report) -> None:
        """A running stage reports its work."""
        now = self._clock()
        with self._lock:
            job = self._jobs.get(name)
            if job is None:
                return
            if job.pace is None or not job.pace.goes_on_with(report):
                job.pace = Pace(report, now)
            else:
                job.pace.add(report, now)

    def finished(self, name: str, result: Mapping[str, Any]) -> str:
        """A stage is done; returns the line that says so."""
        seconds = result.get("seconds", 0.0)
        with self._lock:
            job = self._jobs.pop(name, None)
            self._done.add(name)
            if job is not None and job.pace is not None:
                self._warm.add(job.process)
                if job.fresh and job.pace.report.last and job.pace.share > 0:  # without what its process imported
                    self._time.measured(name, job.pace.seconds / job.pace.share)
                    job = None
            if job is not None and not (job.fresh and job.pace is not None):
                self._time.measured(name, seconds)
            number = len(self._done)
        tokens = result.get("counts", {}).get("tokens")
        note = f" ({tokens:,} tokens)" if tokens is not None else ""
        total = len(self._graph.stages)
        return f"[{number:0{len(str(total))}d}/{total}] {name} done in {seconds:.1f} s{note}"

    def report(self, report: Report) -> None:
        """Work in this process reports, which runs one stage at a time."""
        for name in [name for name, job in list(self._jobs.items()) if job.process == 0]:
            self.of_stage(name, report)

    def close(self) -> None:
        """End the display; what it showed is gone."""
        self._say_that_it_stops()
        self.display.close()

    # --- what is shown ---

    def picture(self) -> list[Line]:
        """The lines of a terminal: the run, then each job."""
        self._say_that_it_stops()
        with self._lock:
            now = self._clock()
            jobs = {name: job.under_way(self._time.planned(name), now) for name, job in self._jobs.items()}
            left, expected, share = self._left(jobs)
            whole = [Field(f"{len(self._done)} of {len(self._graph.stages)} stages", style="bold")]
            whole += [Field(bar(share), 2, "green"), Field(f"{share:.0%}", 1)]
            whole += [Field(duration(now - self._began), 3), Field(_left(left), 9, "bold")]
            if self._part is not None:
                whole.insert(0, Field(self._title, 5))
            lines = [self._job(name, each, expected) for name, each in jobs.items()]
            for place in (0, 1):  # names below each other, and what they do
                longest = max((len(line[place].text) for line in lines), default=0)
                for line in lines:
                    line[place] = line[place]._replace(text=line[place].text.ljust(longest))
            return [whole, *lines]

    def line(self) -> str:
        """The same as one plain line; empty once everything is done."""
        with self._lock:
            if len(self._done) == len(self._graph.stages):
                return ""
            now = self._clock()
            jobs = {name: job.under_way(self._time.planned(name), now) for name, job in self._jobs.items()}
            left, expected, _ = self._left(jobs)
            title = f"{self._title}: " if self._part is not None else ""
            stages = f"{len(self._done)} of {len(self._graph.stages)} stages"
            whole = f"{title}{stages}, {duration(now - self._began)} so far, {_left(left)}"
            lines = {name: self._job(name, job, expected)[1:] for name, job in jobs.items()}
            each = [f"{name}: {', '.join(field.text for field in line)}" for name, line in lines.items()]
            return "; ".join([whole, *each])

    @property
    def _title(self) -> str:
        assert self._part is not None
        return f"{self._part.label} ({self._part.number} of {self._part.of})"

    def _job(self, name: str, job: UnderWay, expected: Mapping[str, float]) -> list[Field]:
        pace = self._jobs[name].pace
        line = [Field(name), Field(self._doing(name), 2, "dim")]
        line += described(pace.report) if pace is not None else []
        left = stage_left(job, expected.get(name))
        return [*line, *([Field(_left(left), 4)] if left is not None else [])]

    def _doing(self, name: str) -> str:
        stage = self._graph.stage(name)
        return stage.work.doing or stage.kind.replace("_", " ")

    def _left(self, jobs: Mapping[str, UnderWay]) -> tuple[float | None, dict[str, float], float]:
        """Seconds left, the corrected seconds of every stage as far as they are known, and the share that is done."""
        names = [stage.name for stage in self._graph.stages]
        waiting = [name for name in names if name not in self._done and name not in jobs]
        left = self._time.left(waiting, jobs)
        known = self._time.expected([*waiting, *jobs], jobs)
        expected = known or {name: self._time.planned(name) for name in jobs}
        gone = sum(map(self._time.planned, self._done))
        work = gone + sum(map(self._time.planned, [*waiting, *jobs]))
        for name, job in jobs.items():
            rest = stage_left(job, expected[name]) or 0.0
            gone += self._time.planned(name) * min(1.0, job.elapsed / max(job.elapsed + rest, 1e-9))
        if left is not None and self._part is not None and self._part.number < self._part.of:
            left += (self._part.of - self._part.number) * (self._time.whole() or 0.0)
        return left, known or {}, gone / max(work, 1e-9)

    def _say_that_it_stops(self) -> None:
        """Once a stop is asked for, above the picture; a signal's handler must not write into it."""
        if self._stop is not None and self._stop.requested and self.display.live:
            self._stop = None
            self.display.say(STOPPING)


def _left(seconds: float | None) -> str:
    return "time left: …" if seconds is None else f"{duration(seconds)} left"
