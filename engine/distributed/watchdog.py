"""Shows where a process hangs: dumps its stacks to standard error when `beat` was not called for too long.

A rank that waits for another fails by its collective's timeout, but only the hanging rank can show where it hangs.
faulthandler's own thread writes the dump, so it also works while Python waits inside a library.
"""

from __future__ import annotations

import faulthandler
import os
import time

_APART_S = 0.25
_timeout_s: float | None = None
_armed = 0.0


def watch(timeout_s: float) -> None:
    """Dump all stacks whenever `beat` was not called for `timeout_s`, and at a crash inside a library.

    Ranks that wait for the hanging one dump theirs too, one after another, so that their lines do not mix.
    """
    global _timeout_s
    faulthandler.enable()
    _timeout_s = timeout_s + _APART_S * int(os.environ.get("LOCAL_RANK", "0"))
    _arm()


def beat() -> None:
    """Restart the timeout; cheap enough for every step. Does nothing unless the process is watched."""
    if _timeout_s is not None and time.monotonic() - _armed > _timeout_s / 20:
        _arm()


def rest() -> None:
    """Stop watching."""
    global _timeout_s
    _timeout_s = None
    faulthandler.cancel_dump_traceback_later()


def _arm() -> None:
    global _armed
    assert _timeout_s is not None
    _armed = time.monotonic()
    faulthandler.dump_traceback_later(_timeout_s)
