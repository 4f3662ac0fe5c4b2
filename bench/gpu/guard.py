"""Runs one command under a time limit and leaves nothing of it behind: `python guard.py SECONDS COMMAND...`.

The command gets a session and process group of its own. It ends when it ends, after SECONDS, or when this process's
standard input is closed, which happens also when the suite that holds the other end is killed. It is interrupted first
(pytest then says how far it came), and after a short grace its whole group is killed. Processes that it detached from
the group become children of this one, a subreaper, and are killed too. Exit status: the command's; 124 after SECONDS,
125 when told to stop; 128 + N where a signal N ended the command. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 3.0
TIMED_OUT, TOLD_TO_STOP = 124, 125
PR_SET_CHILD_SUBREAPER = 36


def run(seconds: float, command: Sequence[str]) -> int:
    """Run the command to its end or its limit; return the exit status above."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has subreapers
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    status = wait(child, time.monotonic() + seconds)
    if status:
        _signal_group(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    kill_children()
    return status or (code if code >= 0 else 128 - code)


def wait(child: subprocess.Popen[bytes], end: float) -> int:
    """Wait until the command ends (0), its time is over or standard input is closed."""
    while child.poll() is None:
        if time.monotonic() > end:
            return TIMED_OUT
        if select.select([0], [], [], 0.05)[0] and not os.read(0, 1):
            return TOLD_TO_STOP
    return 0


def kill_children() -> None:
    """Kill what became a child of this process, until there is none."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # a group whose members are all gone
        os.killpg(group, number)


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    raise SystemExit(run(float(sys.argv[1]), sys.argv[2:]))
