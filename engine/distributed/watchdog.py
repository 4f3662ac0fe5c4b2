"""Where a process stands still: its stacks go to standard error when it shows no sign of life for too long.

A rank that waits for another fails by its collective's timeout, but only the one that hangs can say where it hangs.
The dump is faulthandler's own thread, so it also works where Python waits inside a library.
"""

from __future__ import annotations

import faulthandler
import os
import time

_APART_S = 0.25
_timeout_s: float | None = None
_armed = 0.0


def watch(timeout_s: float) -> None:
    """From here on, dump all stacks whenever `beat` was not called for so long; also at a crash inside a library.

    Ranks that wait for the one that hangs dump theirs, too: one after another, so that the lines stay apart.
    """
    global _timeout_s
    faulthandler.enable()
    _timeout_s = timeout_s + _APART_S * int(os.environ.get("LOCAL_RANK", "0"))
    _arm()


def beat() -> None:
    """A sign of life; cheap enough for every step. Does nothing unless the process is watched."""
    if _timeout_s is not None and time.monotonic() - _armed > _timeout_s / 20:
        _arm()


def rest() -> None:
    """Watch no longer."""
    global _timeout_s
    _timeout_s = None
    faulthandler.cancel_dump_traceback_later()


def _arm() -> None:
    global _armed
    assert _timeout_s is not None
    _armed = time.monotonic()
    faulthandler.dump_traceback_later(_timeout_s)
