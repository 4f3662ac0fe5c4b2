"""A tracker that fails, hangs or crashes is reported once; training continues and metrics.jsonl is complete.

What trackers are sent: every step once over all resumes, allow-listed settings, nothing secret.
"""

from __future__ import annotations

import json
import logging
import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import forked

from macpo.engine.config import OptimSettings
from macpo.engine.training.metrics import MetricsLog
from macpo.engine.training.trackers import Trackers, Training, allowed

CANARY = "canary-4f1d9c0b7e2a6835d1c4"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A secret in the environment; whatever a test does, no file and no message may hold it."""
    monkeypatch.setenv("CANARY_API_KEY", CANARY)
    yield
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def train(
    run: Path,
    names: tuple[str, ...],
    steps: range,
    *,
    key: str = "k",
    planned: int = 9,
    pause: float = 0.0,
    about: dict[str, Any] | None = None,
) -> float:
    """What the trainer does with a log; returns the seconds from the first step to the end of the last."""
    trackers = Trackers(names, "stage", run / "trackers")
    with MetricsLog(
        run / "work", step=steps.start - 1, planned=planned, trackers=trackers, training=Training(key, about or {})
    ) as log:
        began = time.monotonic()
        for step in steps:
            log.write({"step": step, "tokens": 10, "loss": 1.0 / step, "note": "text"})
            time.sleep(pause)
        seconds = time.monotonic() - began
    return seconds


def seen(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trackers" / "seen.jsonl").read_text().splitlines()]


def steps_seen(run: Path) -> list[int]:
    return [row["step"] for row in seen(run) if "step" in row]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    assert not any(CANARY in message for message in messages)
    return messages


def test_a_tracker_gets_every_step_with_its_timing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    about = {"learning_rate": 1e-3, "adam_betas": (0.9, 0.99), "loss": "sigmoid"}
    train(tmp_path / "run-7", ("fake_trackers:Recorder",), range(1, 10), about=about)
    opened, *rows, closed = seen(tmp_path / "run-7")
    assert opened["open"]["group"] == "run-7" and opened["open"]["name"] == "stage"
    assert opened["open"]["config"] == {"learning_rate": 1e-3, "adam_betas": [0.9, 0.99], "loss": "sigmoid"}
    assert [row["step"] for row in rows] == list(range(1, 10)) and closed == {"close": True}
    assert rows[3]["loss"] == 0.25 and rows[3]["timing/seconds"] >= 0 and "note" not in rows[3]
    assert said(caplog) == []


FAILURES = {
    "fake_trackers:Network": "ConnectionError: the service is gone: GET /?key=***",
    "fake_trackers:Unclosed": "TimeoutError: no answer",
    "fake_trackers:Crash": "its process ended with exit code -6",
    "fake_trackers:quitter": "SystemExit: no API key",
    "fake_trackers:missing": "has no attribute 'missing'",
    "nowhere:at_all": "No module named 'nowhere'",
    "typo": "use tensorboard, wandb, trackio or module:function, not 'typo'",
}


def test_a_failure_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, (*FAILURES, *FAILURES), range(1, 10), pause=0.2)
    messages = said(caplog)
    assert len(messages) == len(FAILURES)
    for name, why in FAILURES.items():
        (message,) = (text for text in messages if text.startswith(f"tracker {name} failed ("))
        assert why in message and message.endswith("training goes on, metrics.jsonl is complete")
    assert len((tmp_path / "work" / "metrics.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("name", ["Hanging", "Stuck"])
def test_one_that_hangs_does_not_hold_up_training(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "Hanging":
        monkeypatch.setattr("macpo.engine.training.trackers.START_SECONDS", 0.2)
    monkeypatch.setattr("macpo.engine.training.trackers.CLOSE_SECONDS", 1.5)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, (f"fake_trackers:{name}",), range(1, 10), pause=0.05) < 5.0
    assert time.monotonic() - began < 10.0
    (message,) = said(caplog)
    assert ("it has not started after" if name == "Hanging" else "it did not finish within") in message
    assert len((tmp_path / "work" / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_second_ctrl_c_waits_for_no_tracker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers(("fake_trackers:Stuck",), "stage", tmp_path)
    began = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        MetricsLog(tmp_path / "work", step=0, planned=3, trackers=trackers),
    ):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5.0 and said(caplog) == []


def test_a_resumed_stage_continues_its_run_without_a_step_twice(tmp_path: Path) -> None:
    """Stopped at step 5 with the last checkpoint at 3: 4 and 5 are trained again and were sent before."""
    names = ("fake_trackers:Recorder",)
    train(tmp_path, names, range(1, 6))
    train(tmp_path, names, range(4, 10))
    assert steps_seen(tmp_path) == list(range(1, 10))
    assert len({row["open"]["id"] for row in seen(tmp_path) if "open" in row}) == 1
    train(tmp_path, names, range(10, 10))  # finished before: there is nothing to say, so nothing is started
    assert sum("open" in row for row in seen(tmp_path)) == 2


def test_another_training_is_another_run(tmp_path: Path) -> None:
    names = ("fake_trackers:Recorder",)
    train(tmp_path, names, range(1, 4), key="old settings", planned=3)
    train(tmp_path, names, range(1, 4), key="new settings", planned=3)
    assert steps_seen(tmp_path) == [1, 2, 3, 1, 2, 3]
    assert len({row["open"]["id"] for row in seen(tmp_path) if "open" in row}) == 2


def test_what_a_failed_tracker_missed_is_sent_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path, ("fake_trackers:Network",), range(1, 6))
    assert steps_seen(tmp_path) == [1, 2]
    note = tmp_path / "trackers" / "stage.fake-trackers-Network.json"
    assert json.loads(note.read_text())["sent"] == 3, "a step that failed half-way is not sent twice"
    note.rename(note.with_name("stage.fake-trackers-Recorder.json"))
    train(tmp_path, ("fake_trackers:Recorder",), range(6, 10))
    assert steps_seen(tmp_path) == [1, 2, 4, 5, 6, 7, 8, 9]


def test_a_killed_training_leaves_a_tracker_that_sends_the_rest_and_ends(tmp_path: Path) -> None:
    def killed() -> None:
        trackers = Trackers(("fake_trackers:Recorder",), "stage", tmp_path / "trackers")
        log = MetricsLog(tmp_path / "work", step=0, planned=9, trackers=trackers)
        for step in range(1, 6):
            log.write({"step": step, "tokens": 1, "loss": 1.0})
        os.kill(os.getpid(), 9)

    assert forked(killed) == -9
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (tmp_path / "trackers" / "seen.jsonl").exists() and "close" in seen(tmp_path)[-1]:
            break
        time.sleep(0.1)
    assert steps_seen(tmp_path) == [1, 2, 3, 4, 5] and "close" in seen(tmp_path)[-1]


def test_only_known_and_harmless_settings_are_sent() -> None:
    settings = OptimSettings(learning_rate=1e-3).model_dump(mode="json")
    assert allowed(settings) == settings, "a new setting of training: say whether trackers may have it"
    harmful = {
        "api_key": CANARY,
        "model": f"/home/someone/{CANARY}",
        "reference_model": CANARY,
        "loss": CANARY,
        "objective": "https://user:password@host/",
        "learning_rate": CANARY,
        "adam_betas": [CANARY],
        "seed": {"nested": CANARY},
    }
    assert allowed(harmful) == {}


# --- what the known packages are asked ---

FAKE = """
    import json, os
    from pathlib import Path
    def note(**row):
        with open(os.environ["FAKE_LOG"], "a") as file:
            file.write(json.dumps(row) + "\\n")
    def Settings(**settings):
        return settings
    class Run:
        def log(self, metrics, step):
            note(step=step, metrics=metrics)
        def finish(self):
            note(finish=True)
    def init(**arguments):
        note(init=arguments)
        return Run()
    def teardown():
        note(teardown=True)
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_wandb_and_trackio_are_sent(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.jsonl"))
    run = tmp_path / "run-1"
    about = {"learning_rate": 1e-3, "model": f"/secret/{CANARY}"}
    train(run, (name,), range(1, 4), about=about)
    train(run, (name,), range(3, 10), about=about)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    first, second = (call["init"] for call in calls if "init" in call)
    assert first == second and first["resume"] == "allow"
    assert first["project"] == "macpo" and first["group"] == "run-1" and first["config"] == {"learning_rate": 1e-3}
    if name == "wandb":
        assert first["name"] == "stage" and len(first["id"]) == 16 and first["dir"] == str(run / "trackers")
        settings = first["settings"]
        assert settings["console"] == "off" and settings["disable_git"] and settings["x_disable_meta"]
    else:
        assert first["name"].startswith("run-1-stage-")
    sent = [call for call in calls if "step" in call]
    assert [call["step"] for call in sent] == list(range(1, 10))
    assert set(sent[0]["metrics"]) == {"tokens", "loss", "timing/seconds"}
    assert sum("finish" in call for call in calls) == 2


def test_tensorboard_holds_every_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run-1"
    train(run, ("tensorboard",), range(1, 6))
    train(run, ("tensorboard",), range(4, 10))
    (folder,) = (run / "trackers" / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 10))
    assert [event.value for event in losses] == pytest.approx([1 / step for step in range(1, 10)])
    assert "timing/seconds" in events.Tags()["scalars"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", (CANARY * 3)[:40])
    run = tmp_path / "run-1"
    train(run, ("wandb",), range(1, 6), about={"learning_rate": 1e-3})
    assert said(caplog) == []
    (record,) = (run / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"learning_rate" in content and b"loss" in content
    for private in (os.uname().nodename, str(Path.home()), str(tmp_path), "pytest"):
        assert len(private) < 5 or private.encode() not in content  # shorter ones stand in binary data by chance


def test_trackio_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    run = tmp_path / "run-1"
    train(run, ("trackio",), range(1, 6))
    train(run, ("trackio",), range(4, 10))
    assert said(caplog) == []
    (database,) = (tmp_path / "store").glob("macpo*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, run_name from metrics order by step").fetchall()
    assert [step for step, _ in rows] == list(range(1, 10)) and len({name for _, name in rows}) == 1
