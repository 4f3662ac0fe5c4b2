"""Runs parts one after the other (on a CPU side by side), each under a guard, and keeps the archive up to date."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO

from bench.gpu import guard
from bench.gpu.machine import ROOT
from bench.gpu.parts import Part
from bench.gpu.store import DONE, RUNNING, SKIPPED, Outcome, Store

BUNDLE_S = 15.0
LEAST_S = 8.0  # a part with less time than this, or than a quarter of its limit, is not begun
SMALL_S = 180  # limit of a part at small sizes, whose time does not matter


@dataclass
class Running:
    """A part that runs under its guard."""

    part: Part
    outcome: Outcome
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: float


class Runner:
    """Runs parts until `end` (time.monotonic()); `python` is the command that runs a part's arguments."""

    def __init__(
        self, store: Store, environment: Mapping[str, str], python: Sequence[str], data: str, end: float
    ) -> None:
        self.store, self.environment, self.python, self.data, self.end = store, environment, python, data, end
        self.running: list[Running] = []

    def run(self, parts: Sequence[tuple[Part, Outcome]], jobs: int) -> None:
        """Run the parts in their order, `jobs` at once; the archive is whole after each, and every BUNDLE_S."""
        waiting, bundled = list(parts), time.monotonic()
        self.store.bundle()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < jobs:
                    self._start(*waiting.pop(0))
                time.sleep(0.05)
                ended = [running for running in self.running if running.process.poll() is not None]
                for running in ended:
                    self._end(running)
                if ended or time.monotonic() - bundled > BUNDLE_S:
                    self.store.bundle()
                    bundled = time.monotonic()
        finally:
            self.stop()
            self.store.bundle()

    def _start(self, part: Part, outcome: Outcome) -> None:
        left = self.end - time.monotonic()
        if left < max(LEAST_S, part.seconds / 4):
            if self.store.outcome(part.name) is None:
                self._skip(replace(outcome, reason=f"no time left ({max(0.0, left):.0f} s)"))
            return
        if outcome.reason:
            self._skip(outcome)
            return
        command, limit = (part.small, SMALL_S) if outcome.small else (part.command, part.seconds)
        outcome = replace(outcome, status=RUNNING, limit=limit)
        folder = self.store.begin(outcome)
        words = [word.format(out=folder, data=self.data) for word in command]
        guarded = [sys.executable, guard.__file__, str(min(left, limit)), *self.python, *words]
        log = (folder / "log").open("wb")
        process = subprocess.Popen(
            guarded,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the suite, which then tells the guards
            cwd=ROOT,
            env=self.environment,
        )
        self.running.append(Running(part, outcome, process, log, time.monotonic()))

    def _skip(self, outcome: Outcome) -> None:
        self.store.write(replace(outcome, status=SKIPPED))
        print(f"== {outcome.name}: skipped: {outcome.reason}", flush=True)

    def _end(self, running: Running) -> None:
        self.running.remove(running)
        running.log.close()
        code, seconds = running.process.wait(), time.monotonic() - running.start
        status = {0: DONE, guard.TIMED_OUT: "out of time", guard.TOLD_TO_STOP: "stopped"}.get(code, f"exit {code}")
        self.store.write(replace(running.outcome, status=status, seconds=round(seconds, 1)))
        left = self.end - time.monotonic()
        print(f"== {running.part.name}: {status} in {seconds:.0f} of {running.outcome.limit} s", end="")
        print(f", {left:.0f} s left", flush=True)
        if status != DONE:
            print("\n".join(f"   | {line}" for line in self.store.tail(running.part.name)), flush=True)

    def stop(self) -> None:
        """Tell the guards of what still runs to kill it, and wait for them."""
        for running in self.running:
            with contextlib.suppress(OSError):
                if running.process.stdin:
                    running.process.stdin.close()
        for running in list(self.running):
            running.process.wait()
            self._end(running)
