"""One tracker's process: reads a stage's metrics as they are written and forwards them until its input ends.

`engine/training/trackers.py` starts it. It prints `ready` when the tracker is open, or the reason why it fails.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from macpo.engine.training.trackers import CLOSE_SECONDS, Note, Tracker, TrackerRun

POLL_SECONDS = 0.5
PROJECT = "macpo"


class Rows:
    """Reads new complete lines of metrics.jsonl, each with its line of timing.jsonl."""

    def __init__(self, workdir: Path) -> None:
        # opened once: the folder is renamed when its stage is committed
        self._files = [(workdir / name).open("rb") for name in ("metrics.jsonl", "timing.jsonl")]
        self._timing: dict[int, dict[str, Any]] = {}

    def new(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, numbers) of each new line; the names of timing.jsonl's numbers begin with `timing/`."""
        metrics, timing = ([json.loads(line) for line in self._lines(file)] for file in self._files)
        self._timing |= {row["step"]: row for row in timing}
        for row in metrics:
            step = row["step"]
            seen = self._timing.pop(step, {})
            numbers = row | {f"timing/{name}": value for name, value in seen.items()}
            yield step, {k: v for k, v in numbers.items() if k not in ("step", "timing/step") and _is_number(v)}

    @staticmethod
    def _lines(file: Any) -> Iterator[bytes]:
        while (line := file.readline()).endswith(b"\n"):
            yield line
        file.seek(-len(line), os.SEEK_CUR)  # the rest of a partial line comes later


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def open_tracker(name: str, run: TrackerRun) -> Tracker:
    """Open the tracker of that name; raises whatever it raises."""
    if name in _KNOWN:
        return _KNOWN[name](run)
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"use {', '.join(_KNOWN)} or module:function, not {name!r}")
    tracker: Tracker = getattr(importlib.import_module(module), function)(run)
    return tracker


class _TensorBoard:
    """Writes event files under trackers/tensorboard/, without torch."""

    def __init__(self, run: TrackerRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        # one folder per id, so that a rerun's curves do not mix with those of the training that it replaces
        folder = Path(run.folder) / "tensorboard" / f"{run.name}-{run.id[:4]}"
        self._writer = EventFileWriter(str(folder), flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Project `macpo` (or WANDB_PROJECT), one group per run folder, one run per stage; honours WANDB_MODE=offline.

    Nothing that W&B collects by itself (command line, host, user, git, code, packages, console, system) is sent.
    """

    def __init__(self, run: TrackerRun) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, host="macpo", username="macpo",
            disable_code=True, disable_git=True, disable_job_creation=True, save_code=False,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.group,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=run.folder,
            settings=settings,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # its service process


class _Trackio:
    """Project `macpo` (or TRACKIO_PROJECT), one group per run folder, one run per stage."""

    def __init__(self, run: TrackerRun) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            group=run.group,
            name=f"{run.group}-{run.name}-{run.id[:4]}",  # trackio knows runs by name
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_KNOWN: dict[str, Callable[[TrackerRun], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


def follow(order: Mapping[str, Any], ended: threading.Event) -> None:
    """Open the tracker, send what has not been sent, continue until `ended`, then close it."""
    path = Path(order["note"])
    note = Note(path, **json.loads(path.read_text()))
    rows = Rows(Path(order["workdir"]))
    tracker = open_tracker(order["name"], TrackerRun(**order["run"]))
    _say("ready")
    last = False
    while not last:
        last = ended.wait(POLL_SECONDS)  # what was written before the end is read after it
        for step, numbers in rows.new():
            if step > note.sent:
                note.sent = step
                note.write()  # before sending: a kill loses a step of the tracker rather than duplicating it
                tracker.log(step, numbers)
    tracker.close()


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # training was killed; its metrics are sent all the same
        os.write(_CHANNEL, text.encode() + b"\n")


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(CLOSE_SECONDS + 5)  # training waits no longer than CLOSE_SECONDS, if it still lives
    _end_all()


def _end_all() -> None:
    """Kill this process and those that the tracker's library started; `trackers.py` gave them their own session."""
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    global _CHANNEL
    _CHANNEL = os.dup(1)
    os.dup2(2, 1)  # what trackers print must not be taken for what we say
    order = json.loads(sys.stdin.buffer.readline() or b"{}")
    if not order:
        return
    sys.path[:] = order["path"]
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    try:
        follow(order, ended)
    except BaseException as error:  # also SystemExit, with which some libraries end a process
        _say(re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:2000])
        _end_all()
    os._exit(0)  # without the exit handlers of libraries, which may wait for a network; the tracker is closed


_CHANNEL = 1

if __name__ == "__main__":
    main()
