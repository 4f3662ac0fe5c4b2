"""FAULTS 39: a tracker that fails is said once; training goes on and metrics.jsonl is complete."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from macpo.engine.metrics import MetricsLog
from macpo.engine.trackers import Trackers

SEEN: dict[str, list[int]] = {}


class Network:
    """A tracker whose service goes away after two steps."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage = stage
        SEEN[stage] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > 2:
            raise ConnectionError("the service is gone")
        SEEN[self.stage].append(step)

    def close(self) -> None:
        raise TimeoutError("no answer")


def test_a_failing_tracker_is_said_once_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers((f"{__name__}:Network", f"{__name__}:missing", "nowhere:at_all", "typo"), "train", tmp_path)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, step=0, planned=5, trackers=trackers) as log:
        for step in range(1, 6):
            log.write({"step": step, "tokens": 10, "loss": 1.0})
    assert SEEN["train"] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    said = [record.getMessage() for record in caplog.records]
    assert sum("the service is gone" in text for text in said) == 1


def test_a_tracker_that_only_fails_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers((f"{__name__}:Network",), "short", tmp_path)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, step=0, planned=1, trackers=trackers) as log:
        log.write({"step": 1, "tokens": 10, "loss": 1.0})
    assert SEEN["short"] == [1] and any("no answer" in record.getMessage() for record in caplog.records)


def test_unknown_trackers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Trackers(("typo", "nowhere:at_all"), "train", tmp_path)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "tracker typo failed",
        "tracker nowhere:at_all failed",
    ]
