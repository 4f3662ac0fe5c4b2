"""Threads of this process, its end with its parent, and requests to stop. Needs no torch."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of operators, also if torch is imported later; None changes nothing."""
    if threads is None:
        return
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends in any way (Linux)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the line above


class Terminated(BaseException):
    """SIGTERM came where nothing has to be brought to a safe point first; no `except Exception` keeps it."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Context in which SIGTERM raises Terminated in the main thread, as Ctrl-C raises KeyboardInterrupt.

    Inside it a `StopFlag` takes over. A handler that is there already stays. Both signals are let through where
    the process was started with them blocked (`signals_blocked`).
    """
    global _terminated
    in_main = threading.current_thread() is threading.main_thread()
    mine = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
        _keep_the_exit_code()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        yield
    finally:
        if mine:
            _terminated = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_terminated = False


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True  # a library may swallow the exception: the next StopFlag knows
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt what the first has begun
    raise Terminated


@contextlib.contextmanager
def killed_by_sigterm() -> Iterator[None]:
    """Context inside `ended_by_sigterm` in which SIGTERM ends the process at once by its default action.

    For code that waits outside Python, where no handler runs, and has nothing to bring to a safe point.
    """
    main = threading.current_thread() is threading.main_thread()
    mine = main and signal.getsignal(signal.SIGTERM) is _terminate
    if mine:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, _terminate)


def stop_behind(error: BaseException) -> BaseException | None:
    """The SIGTERM or Ctrl-C that an error came of, if any: Python and libraries make other errors of both.

    In Python 3.11, for example, one that comes inside `__set_name__` leaves as a RuntimeError.
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        if isinstance(found, Terminated | KeyboardInterrupt):
            return found
        seen.add(id(found))  # an error may be its own cause
        found = found.__cause__ or found.__context__
    return None


def forget_ctrl_c() -> None:
    """After a Ctrl-C that was answered: let the interpreter end with the exit code it is given.

    CPython notes when a KeyboardInterrupt leaves code that was compiled from text, as dataclasses and named tuples are
    while modules are imported, and under `python -m` then ends by SIGINT whatever became of it. Running any text takes
    the note back (run_eval_code_obj in Python/pythonrun.c, pymain_run_module in Modules/main.c).
    """
    exec("", {})


@functools.cache
def _keep_the_exit_code() -> None:
    """Once the process ends by itself, SIGTERM and Ctrl-C no longer change its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        atexit.register(signal.signal, number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Context in which processes are started that get SIGTERM and SIGINT only once they can answer them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heeded() -> list[signal.Signals]:
    """Those of SIGTERM and SIGINT that this process does not ignore."""
    return [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]


class StopFlag:
    """Context manager; inside it `requested` becomes true on SIGTERM or SIGINT (main thread only).

    A signal that the process ignores, as background jobs of scripts do with SIGINT, stays ignored.
    `quiet`: print no message.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self.quiet = quiet
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.requested |= _terminated
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                self._old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        before, self.requested = self.requested, True  # first, because another signal may come during the write
        if before and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not before and not self.quiet:
            os.write(2, b"stopping at the next safe point; Ctrl-C again aborts at once\n")  # print is not reentrant
