"""The commands as a user gives them: `macpo …` in this process, torchrun on two ranks, anything on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from macpo.cli import main

ROOT = Path(__file__).parents[2]


def macpo(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "engine/train.py", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


_STEPS = re.compile(r"\x1b\[(?P<count>\d*)(?P<what>[A-Za-z])|\r|\n|[^\x1b\r\n]")


class Screen:
    """All lines that a terminal of so many columns has shown, as what was written to it leaves them."""

    def __init__(self, columns: int) -> None:
        self.columns, self.row, self.column = columns, 0, 0
        self.lines = [""]

    def write(self, text: str) -> None:
        for step in _STEPS.finditer(text):
            if step["what"] == "A":
                self.row = max(0, self.row - int(step["count"] or 1))
            elif step["what"] == "J":
                self.lines[self.row :] = [self.lines[self.row][: self.column]]
            elif step["what"]:
                assert step["what"] == "m", f"no other control is expected: {step[0]!r}"
            elif step[0] == "\r":
                self.column = 0
            elif step[0] == "\n":
                self._down()
            else:
                if self.column == self.columns:  # the terminal breaks the line
                    self._down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + step[0] + line[self.column + 1 :]
                self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


class Terminal:
    """A command on a terminal.

    Args:
        resize: number of columns that the terminal gets once a text was shown, by that text.
        keys: bytes that are typed once a text was shown, by that text.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 100,
        resize: Mapping[str, int] | None = None,
        keys: Mapping[str, bytes] | None = None,
        environment: Mapping[str, str] | None = None,
        seconds: float = 120,
    ) -> None:
        terminal, other = pty.openpty()
        self._resize(terminal, columns)
        before = termios.tcgetattr(other)
        process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "TERM": "xterm-256color", **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.screen, self.raw, self.pictures = Screen(columns), "", list[list[str]]()
        waiting: dict[str, Callable[[], object]] = {
            text: lambda to=to: self._narrow(terminal, to) for text, to in (resize or {}).items()
        } | {text: lambda key=key: os.write(terminal, key) for text, key in (keys or {}).items()}
        os.set_blocking(terminal, False)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                try:
                    text = os.read(terminal, 1 << 16).decode(errors="replace")
                except BlockingIOError:
                    text = ""
                if text:
                    self.raw += text
                    self.screen.write(text)
                    self.pictures.append(list(self.screen.lines))
                    for each in [each for each in waiting if each in self.raw]:
                        waiting.pop(each)()
                elif ended:
                    break
                else:
                    time.sleep(0.02)
            assert process.poll() is not None, f"it does not end: {self.raw[-2000:]}"
            self.code = process.returncode
            self.unchanged = termios.tcgetattr(other) == before
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            os.close(terminal)
            os.close(other)

    @property
    def lines(self) -> list[str]:
        """What is on the screen at the end, without empty lines."""
        return [line.rstrip() for line in self.screen.lines if line.strip()]

    def _narrow(self, terminal: int, columns: int) -> None:
        """Change the size; longer lines are broken, as most terminals do it, and the cursor keeps its place in them."""
        old, self.screen = self.screen, Screen(columns)
        for number, line in enumerate(old.lines):
            self.screen.write(line + ("\r\n" if number < len(old.lines) - 1 else ""))
        self._resize(terminal, columns)

    @staticmethod
    def _resize(terminal: int, columns: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
