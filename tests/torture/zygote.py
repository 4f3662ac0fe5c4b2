"""The command line in forked processes, so that a trial costs no imports: killed, stopped, limited, or left alone."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shim import Call, Control, Kill

import macpo.cli
from macpo.engine.run.executor import Executor
from macpo.engine.run.stages import Stage

HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, minus the signal that killed it, or HUNG; and what it printed."""

    code: int | str
    printed: str
    num_calls: int
    calls: list[Call]
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.printed.strip().splitlines() or [""])[-1][:300]


@dataclass(frozen=True, slots=True)
class Orders:
    """What is done to a command. `until`: the stage after whose commit it gets a SIGTERM from itself."""

    kill: Kill | None = None
    until: str = ""
    logs: bool = False
    file_bytes: int | None = None
    signal_after: tuple[int, float] | None = None
    limit_s: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)


class Zygote:
    """Runs `macpo …` in forks of this process, which the shim was loaded into; `watched` is the run's folder."""

    def __init__(self, control: Control, scratch: Path, watched: Path) -> None:
        self.control, self.scratch, self.watched = control, scratch, watched
        torch.set_num_threads(1)  # forks need a parent without threads
        self.output, self.modules = scratch / "printed.txt", scratch / "modules.txt"

    def warm(self, *words: object) -> None:
        """Import what the last command imported, and run one that writes nothing: the caches it fills are inherited."""
        for name in self.modules.read_text().split():
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        if words:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):
                macpo.cli.main([str(word) for word in words])
        gc.collect()
        gc.freeze()  # a collection in a fork would copy every page

    def macpo(self, words: Sequence[object], orders: Orders = Orders()) -> Ended:
        """Run one command to its end, however it comes."""
        sys.stdout.flush()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._child([str(word) for word in words], orders)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # whichever of the two comes first
        code = self._wait(pid, orders)
        num_calls = self.control.disarm()
        calls = self.control.calls() if orders.logs else []
        printed = self.output.read_text(errors="replace")
        return Ended(code, printed, num_calls, calls, time.monotonic() - began)

    def _wait(self, pid: int, orders: Orders) -> int | str:
        handle = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if orders.signal_after:
                number, seconds = orders.signal_after
                while not self.control.armed and not poll.poll(1):
                    pass  # the fork is not yet where a command of its own would begin
                if not poll.poll(seconds * 1000):
                    os.kill(pid, number)
            hung = not poll.poll(orders.limit_s * 1000)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what a command leaves running is none of its own either
            _, status = os.waitpid(pid, 0)
        finally:
            os.close(handle)
        return HUNG if hung else os.waitstatus_to_exitcode(status)

    def _child(self, words: list[str], orders: Orders) -> None:
        code = 99
        try:
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
            out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(orders.environment)
            if orders.until:
                _stop_after(orders.until)
            if orders.file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (orders.file_bytes, orders.file_bytes))
            self.control.arm(self.watched, os.getpid(), orders.kill, logs=orders.logs)
            macpo.cli.main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
                if orders.logs:
                    self.modules.write_text("\n".join(sys.modules))
            os._exit(code)


def _stop_after(name: str) -> None:
    """In a child: the process gets a SIGTERM as soon as the stage is committed."""
    execute = Executor.execute

    def stopping(self: Executor, stage: Stage, digests: Mapping[str, str]) -> dict[str, Any]:
        result = execute(self, stage, digests)
        if stage.name == name:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Executor.execute = stopping  # type: ignore[method-assign]  # in a forked child only
