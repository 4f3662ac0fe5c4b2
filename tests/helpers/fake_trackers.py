"""Trackers for test_trackers.py; they live in a process of their own, so what they see goes into files."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from macpo.engine.training.trackers import TrackerRun


class Recorder:
    """Appends what it is told to seen.jsonl."""

    def __init__(self, run: TrackerRun) -> None:
        self.file = Path(run.folder) / "seen.jsonl"
        self.write({"open": asdict(run)})

    def write(self, row: Mapping[str, object]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.write({"step": step, **metrics})

    def close(self) -> None:
        self.write({"close": True})


class Network(Recorder):
    """Its service goes away after two steps; the message holds a secret, as some do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > 2:
            raise ConnectionError(f"the service is\ngone: GET /?key={os.environ['CANARY_API_KEY']}")
        super().log(step, metrics)


class Hanging(Recorder):
    """Hangs when it is opened, and prints while it does so."""

    def __init__(self, run: TrackerRun) -> None:
        super().__init__(run)
        print("ready to hang")
        time.sleep(600)


class Unclosed(Recorder):
    """Cannot say goodbye."""

    def close(self) -> None:
        raise TimeoutError("no answer")


class Stuck(Recorder):
    """Never ends closing."""

    def close(self) -> None:
        time.sleep(600)


class Crash(Recorder):
    """Takes its process with it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        os.abort()


def quitter(run: TrackerRun) -> Recorder:
    """A library that ends the process."""
    sys.exit("no API key")
