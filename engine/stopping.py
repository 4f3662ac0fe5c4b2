"""SIGTERM and Ctrl-C become a flag that stages look at; a second Ctrl-C aborts at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class StopFlag:
    """Context manager; inside it `requested` turns true on SIGTERM or SIGINT (main thread only).

    `quiet`: says nothing about it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self.quiet = quiet
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        before, self.requested = self.requested, True  # first, for the next signal may come during the write
        if before and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not before and not self.quiet:
            os.write(2, b"stopping at the next safe point; Ctrl-C again aborts at once\n")  # print is not reentrant
