"""Experiment trackers beside metrics.jsonl: a tracker's failure is reported once, and training continues.

Each tracker runs in its own process (`engine/training/tracker_process.py`), which reads the stage's metrics.jsonl and
timing.jsonl as they grow. So training never waits for a network, a tracker that hangs or crashes harms nothing else,
and a resumed stage catches up: a note beside the tracker's files says which run it continues and what was sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from macpo.engine.errors import MacpoError, one_line
from macpo.engine.files import PART, read_json

log = logging.getLogger(__name__)

START_SECONDS, CLOSE_SECONDS = 60.0, 15.0
# fmt: off
_NUMBERS = frozenset((
    "learning_rate", "epochs", "batch", "warmup_fraction", "weight_decay", "adam_betas", "max_grad_norm",
    "microbatch_tokens", "save_every_steps", "spike_sigma", "beta", "label_smoothing", "sft_weight", "gamma",
    "ld_alpha", "seed", "groups", "steps",
))
# fmt: on
_WORDS = frozenset(("schedule", "on_spike", "loss", "reference"))  # each one of a few words of ours
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TrackerRun:
    """All that a tracker is told about the stage whose curves it gets."""

    group: str
    """The run folder's name."""
    name: str
    """The stage's name."""
    id: str
    """Identifier that is the same after a resume and differs for another training."""
    config: Mapping[str, Any]
    """The stage's settings that `allowed` picked."""
    folder: str
    """Folder for trackers that write files; not part of a stage's result."""


@dataclass(frozen=True, slots=True)
class Training:
    """What identifies and describes a training to its trackers."""

    key: str = ""
    """Changes with whatever makes this another training: a tracker's run with another key is not continued."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings, of which `allowed` picks what is sent."""


class Tracker(Protocol):
    """The calls that a tracker gets; it may raise anything, or hang, at any time."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the numbers of one optimiser step; every step comes once, in order, over all resumes."""
        ...

    def close(self) -> None:
        """Finish; no more steps come."""
        ...


class Trackers:
    """Several trackers as one that never raises.

    Args:
        names: `tensorboard`, `wandb`, `trackio` (each needs the package of that name), or `module:function`, a
            function from `TrackerRun` to a `Tracker`.
        stage: name of the curves.
        folder: `trackers/` of the run's folder.
    """

    def __init__(self, names: Sequence[str], stage: str, folder: Path) -> None:
        self.names, self.stage, self.folder = tuple(names), stage, folder
        self._children: list[_Child] = []

    def start(self, workdir: Path, training: Training, *, finished: bool = False) -> None:
        """Follow the metrics.jsonl of `workdir`; on the main rank only.

        Args:
            finished: nothing more will be written, so trackers that have seen everything are not started.
        """
        for name in dict.fromkeys(self.names):
            try:
                child = _Child(name, self.stage, self.folder, workdir, training, finished)
            except (OSError, MacpoError, ValueError) as error:
                report(name, f"{type(error).__name__}: {error}")
            else:
                self._children.append(child)

    def watch(self) -> None:
        """Report trackers that have failed, each once; takes microseconds."""
        for child in self._children:
            child.watch()

    def close(self, *, at_once: bool = False) -> None:
        """Let the trackers send the rest for at most CLOSE_SECONDS together (none with `at_once`), then end them."""
        for child in self._children:
            child.say_goodbye()
        deadline = time.monotonic() + (0.0 if at_once else CLOSE_SECONDS)
        for child in self._children:
            child.end(deadline, quiet=at_once)
        self._children = []


def allowed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that trackers get: known names whose values are numbers or words that cannot be a secret."""

    def number(value: Any) -> bool:
        return value is None or value == "auto" or isinstance(value, int | float)

    def fits(name: str, value: Any) -> bool:
        if name in _NUMBERS:
            return number(value) or (isinstance(value, list | tuple) and all(map(number, value)))
        return name in _WORDS and isinstance(value, str) and re.fullmatch(r"[a-z_-]{1,20}", value) is not None

    return {name: value for name, value in config.items() if fits(name, value)}


def redacted(text: str) -> str:
    """One line of at most 200 characters, without values of environment variables that may be secret."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return one_line(text)


def report(name: str, why: str) -> None:
    """Log the one warning about a tracker."""
    log.warning("tracker %s failed (%s); training goes on, metrics.jsonl is complete", name, redacted(why))


@dataclass(slots=True)
class Note:
    """Which run of a tracker is continued and what was sent to it; a file beside the tracker's."""

    path: Path
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str = ""
    sent: int = 0

    @classmethod
    def of(cls, path: Path, key: str) -> Note:
        """The existing note for this key, or a new one."""
        with contextlib.suppress(MacpoError, OSError, TypeError, ValueError):
            found = cls(path, **read_json(path))
            if found.key == key:
                return found
        return cls(path, key=key)

    def write(self) -> None:
        """Write the note atomically, but without a sync, because it is written every step."""
        part = self.path.with_name(f".{self.path.name}{PART}")  # what a kill leaves is deleted by the next start
        part.write_text(json.dumps({"id": self.id, "key": self.key, "sent": self.sent}))
        part.replace(self.path)


class _Child:
    """A tracker's process, from the training's side."""

    def __init__(self, name: str, stage: str, folder: Path, workdir: Path, training: Training, finished: bool) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._reported = False
        self._began = time.monotonic()
        self._heard = b""
        folder.mkdir(parents=True, exist_ok=True)
        note = Note.of(folder / f"{stage}.{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json", training.key)
        if finished and note.sent >= _last_step(workdir):
            return
        note.write()
        group = folder.resolve().parent.name
        run = TrackerRun(group, stage, note.id, allowed(training.settings), str(folder.resolve()))
        order = {"path": sys.path, "name": name, "workdir": str(workdir), "note": str(note.path), "run": asdict(run)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "macpo.engine.training.tracker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for training; the tracker stops when its input ends
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def watch(self) -> None:
        """Read what the process printed: `ready`, or why it failed."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        code = self._process.poll()
        with contextlib.suppress(BlockingIOError):
            self._heard += self._process.stdout.read() or b""
        if code is not None:
            self._forget()
            if code:
                why = self._heard.decode(errors="replace").removeprefix("ready\n").strip()
                self._report(why or f"its process ended with exit code {code}")
        elif not self._heard and time.monotonic() - self._began > START_SECONDS:
            self._report(f"it has not started after {START_SECONDS:.0f} s")

    def _report(self, why: str) -> None:
        if not self._reported:
            self._reported = True
            report(self.name, why)

    def say_goodbye(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def end(self, deadline: float, *, quiet: bool) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            if not quiet:
                self._report(f"it did not finish within {CLOSE_SECONDS:.0f} s")
        else:
            self.watch()

    def kill(self) -> None:
        """Kill the process and those that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None


def _last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
