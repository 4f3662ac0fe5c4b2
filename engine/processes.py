"""Threads of this process, its memory, its end with its parent, and requests to stop. Needs no torch."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

from macpo.engine.errors import is_failure

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of operators, also if torch is imported later; None changes nothing."""
    if threads is None:
        return
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def return_memory() -> None:
    """Give the system what freed tensors left in the heap; glibc would keep it, up to gigabytes after a training."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends in any way (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the line above


class Terminated(BaseException):
    """SIGTERM came where nothing has to be brought to a safe point first; no `except Exception` keeps it."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Context in which SIGTERM raises Terminated in the main thread, as Ctrl-C raises KeyboardInterrupt.

    Python and libraries make other errors of both: what one raises inside `__set_name__` leaves as a RuntimeError in
    Python 3.11, and matplotlib's C++ code has another word for any error of an array. An error that leaves this
    context after a stop has been raised leaves it as that stop.

    Inside it a `StopFlag` takes over. A handler that is there already stays. Both signals are let through where
    the process was started with them blocked (`signals_blocked`).
    """
    global _raised
    ours: dict[signal.Signals, tuple[Any, Callable[[int, FrameType | None], None]]] = {
        signal.SIGTERM: (signal.SIG_DFL, _terminate),
        signal.SIGINT: (signal.default_int_handler, _interrupt),
    }
    in_main = threading.current_thread() is threading.main_thread()
    mine = [number for number, (usual, _) in ours.items() if in_main and signal.getsignal(number) is usual]
    if mine:
        _raised = None  # of an earlier command of this process
    for number in mine:
        signal.signal(number, ours[number][1])
    if signal.SIGTERM in mine:
        _keep_the_exit_code()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        yield
    except BaseException as error:
        if _raised is not None and is_failure(error):
            raise _raised from error
        raise
    finally:
        if mine:
            _raised = None
        for number in mine:
            signal.signal(number, ours[number][0])


_raised: type[BaseException] | None = None
"""The stop that a signal has raised: a library may swallow it or make another error of it."""


def _terminate(number: int, frame: FrameType | None) -> None:
    global _raised
    _raised = Terminated
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt what the first has begun
    raise Terminated


def _interrupt(number: int, frame: FrameType | None) -> None:
    interrupt()


def interrupt() -> NoReturn:
    """Raise KeyboardInterrupt, in a signal's handler."""
    global _raised
    _raised = KeyboardInterrupt
    raise KeyboardInterrupt


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


STOPPING = "stopping at the next safe point; Ctrl-C again aborts at once"


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
        self.requested |= _raised is Terminated
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
            interrupt()
        if not before and not self.quiet:
            os.write(2, f"{STOPPING}\n".encode())  # print is not reentrant
