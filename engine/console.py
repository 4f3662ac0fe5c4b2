"""What a command prints: notices, a display that a terminal keeps at its bottom, and its errors as one line each.

Its exit code goes with them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TextIO

from macpo.engine.errors import MAX_CHARS, MacpoError, Stopped, is_failure, printable
from macpo.engine.files import explain, is_expected
from macpo.engine.processes import Terminated, ended_by_sigterm, forget_ctrl_c

PLAIN_SECONDS, LIVE_SECONDS = 30.0, 0.5
"""Periods of a display's plain line and of its picture on a terminal, wherever something is shown."""
MAX_ERRORS = 100
"""Problems of one command that are printed."""


QUIET_ENVIRONMENT = {
    # bars of downloads and data sets: in a pipe they are one endless line, on a terminal they break our own display
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Variables for libraries in this process and those that it starts; what a user has set stays."""
QUIET_WARNINGS = (
    # how one library calls another: their authors' to mend
    (FutureWarning, "", r"(transformers|peft|torch|datasets|huggingface_hub|accelerate|bitsandbytes)\b"),
    # peft about tied weights: macpo's saving unties them where it has to
    (UserWarning, r".*tie_word_embeddings", r"peft\b"),
)
"""Warnings that a user cannot act on: category, message and module (regular expressions)."""


class _OneLine(logging.Formatter):
    """Log lines, which may name files, models and keys of other people."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), 2 * MAX_CHARS)


def say(text: str, *, error: bool = True) -> None:
    """Print one line, on standard error or standard output; what would control the terminal is escaped."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


_said: set[str] | None = None


@contextlib.contextmanager
def notices_once() -> Iterator[None]:
    """Context in which each notice is printed once, whatever stage, seed or arm says it again."""
    global _said
    outer = _said
    _said = set() if outer is None else outer
    try:
        yield
    finally:
        _said = outer


def notice(text: str, *, of: str = "") -> None:
    """Print a line about something that may hold in several places; `of`: the one which says so."""
    if _said is not None:
        if text in _said:
            return
        _said.add(text)
    say(f"{of}: {text}" if of else text)


class _Notices(logging.Handler):
    """What loggers without a handler say, as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        text, _, trace = self.format(record).partition("\n")
        notice(text)
        if trace:
            print(trace, file=sys.stderr)


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Context of a whole command: log lines are notices, and libraries say only what a user can act on.

    It is the only place where they are silenced; a user's own PYTHONWARNINGS and variables are heeded.
    """
    before = logging.lastResort
    last = _Notices(logging.WARNING)
    last.setFormatter(_OneLine())
    logging.lastResort = last  # of its type only level and handle() are used
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category, message, module in QUIET_WARNINGS:
                warnings.filterwarnings("ignore", message, category, module)
        try:
            yield
        finally:
            logging.lastResort = before


class Field(NamedTuple):
    """A part of a line; `keep`: the higher, the longer it stays where the line is too long. 0 is never left out."""

    text: str
    keep: int = 0
    style: str = ""


Line = Sequence[Field]


def fitted(line: Line, width: int) -> Line:
    """The fields that there is room for, two blanks apart.

    Blanks at the end of fields, which align them with those of other lines, go first, then the least important fields.
    The first field loses its beginning down to 12 characters before what is kept as 4 or more goes.
    """
    kept = list(line)

    def over() -> int:
        return sum(len(field.text) + 2 for field in kept) - 2 - width

    def drop(below: int) -> None:
        while over() > 0 and (loose := [field for field in kept if 0 < field.keep < below]):
            kept.remove(min(loose, key=lambda field: field.keep))

    def shorten(least: int) -> None:
        text = kept[0].text
        if over() > 0 and len(text) > least:
            kept[0] = kept[0]._replace(text="…" + text[-max(least - 1, len(text) - over() - 1) :])

    if over() > 0:
        kept = [field._replace(text=field.text.rstrip()) for field in kept]
    drop(4)
    shorten(12)
    drop(100)
    shorten(2)
    return kept


class Display:
    """Shows `picture()` at the bottom of a terminal, below whatever else is printed, or `line()` every 30 s.

    It is a terminal's picture where standard error is a terminal that can move its cursor and `write` is not given.
    The cursor is never hidden and no mode of the terminal is changed, so that even a killed process leaves nothing to
    be restored.

    Args:
        picture: the lines.
        line: the same content as one plain line; empty where there is nothing to say.
        write: writes plain lines; by default they go to standard error.
    """

    def __init__(
        self,
        picture: Callable[[], Sequence[Line]],
        line: Callable[[], str],
        *,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._picture, self._line, self._clock = picture, line, clock
        self._stream = sys.stderr
        self.live = (
            write is None and self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
        )
        self._write = write or say
        self._lock = threading.RLock()
        self._drawn: list[int] = []
        """Widths of the lines on the terminal."""
        self._shown = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._replaced: list[tuple[str, TextIO, Any]] = []

    def start(self) -> Self:
        """Show it from now on, and again whenever its time has come."""
        if self.live:
            from rich.console import Console

            self._console = Console(file=self._stream, force_terminal=True, highlight=False)  # NO_COLOR is its business
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream.isatty():
                    above = _Above(stream, self._above)
                    self._replaced.append((name, stream, above))
                    setattr(sys, name, above)
            self.draw()
        self._thread.start()
        return self

    def close(self, *, leave: bool = False) -> None:
        """Take it away; with `leave` its last state stays visible, or is said in a last line."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        for name, stream, above in self._replaced:
            above.end()
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
        self._replaced = []
        if self.live:
            with self._lock:
                if leave:
                    self.draw()
                    self._put("\n" if self._drawn else "")
                else:
                    self._put(self._erased())
                self._drawn = []
        elif leave and (line := self._line()):
            self._write(line)

    def tick(self) -> None:
        """Show it again if its time has come."""
        now = self._clock()
        if self.live:
            self.draw()
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            if line := self._line():
                self._write(line)

    def say(self, line: str) -> None:
        """Print a line, above the picture where there is one."""
        if self.live:
            self._above(printable(line) + "\n")
        else:
            self._write(line)

    def draw(self) -> None:
        """Put the picture in the place of the last one."""
        columns, rows = self._size()
        width = max(8, columns - 1)
        lines = [fitted(line, width) for line in self._picture()][: max(1, rows - 1)]
        text = "\n".join(self._styled(line, width) for line in lines)
        with self._lock:
            self._put(self._erased(columns) + text)
            self._drawn = [min(width, sum(len(field.text) + 2 for field in line) - 2) for line in lines]

    def _size(self) -> tuple[int, int]:
        """Columns and rows, as they are now; COLUMNS in the environment would outlast a change."""
        columns, rows = os.get_terminal_size(self._stream.fileno())
        return columns or 80, rows or 24

    def _styled(self, line: Line, width: int) -> str:
        from rich.text import Text

        text = Text("  ").join(Text(printable(field.text), field.style) for field in line)
        with self._console.capture() as captured:
            self._console.print(text, end="", width=width, no_wrap=True, overflow="ellipsis", crop=True)
        return captured.get()

    def _erased(self, columns: int | None = None) -> str:
        """What moves to the picture's first line and clears from there; a narrower terminal has broken its lines."""
        if not self._drawn:
            return "\r"
        columns = columns or self._size()[0]
        rows = sum(max(1, -(-width // columns)) for width in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"

    def _above(self, text: str) -> None:
        """Whole lines that somebody prints, above the picture."""
        with self._lock:
            self._put(self._erased() + text)
            self._drawn = []
            if not self._ended.is_set():
                self.draw()

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, or closed with the process
            self._stream.write(text)
            self._stream.flush()

    def _run(self) -> None:
        while not self._ended.wait(LIVE_SECONDS if self.live else 1.0):
            with contextlib.suppress(OSError):  # the terminal is gone
                self.tick()


class _Above:
    """A stream whose whole lines go above the picture."""

    def __init__(self, stream: TextIO, say: Callable[[str], None]) -> None:
        self._stream, self._say, self._begun = stream, say, ""

    def write(self, text: str) -> int:
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._say(whole + "\n")
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Half a line waits for its end."""

    def end(self) -> None:
        if self._begun:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_cli(
    command: Callable[[], Any], *, debug: bool = False, report: Callable[[BaseException, str], bool] | None = None
) -> int:
    """Call the command, print its error and return the exit code.

    A MacpoError prints its lines and gives its code; a full disk gives 4, a place that cannot be written 2, Ctrl-C and
    SIGTERM 75, anything unexpected 1. `debug` adds the traceback. An error that another rank reports is not printed
    again. `report` gets the error and, for an unexpected one, its text; if it returns True, the error is reported
    elsewhere.
    """
    try:
        with ended_by_sigterm(), quiet_output(), notices_once():
            command()
            sys.stdout.flush()
        return 0
    except BaseException as found:
        error: BaseException = found
        if isinstance(found, Terminated | KeyboardInterrupt):
            forget_ctrl_c()
            by = "stopped by SIGTERM" if isinstance(found, Terminated) else "aborted by Ctrl-C"
            error = Stopped(by, "run the same command again to go on")
        elif isinstance(found, BrokenPipeError):  # the reader of our output, such as `head`, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        elif isinstance(found, OSError) and is_expected(found):
            error = explain(found).with_traceback(found.__traceback__)
        elif not is_failure(found):
            raise
    if debug:
        traceback.print_exception(error)
    text = printable("unexpected " + " ".join(f"{type(error).__name__}: {error}".split()), MAX_CHARS - 60)
    reported = report is not None and report(error, text)
    if not isinstance(error, MacpoError):
        if not reported:
            print(f"error: {text}. Fix: rerun with --debug and report it.", file=sys.stderr)
        return 1
    if not reported and not error.relayed:
        for problem in error.problems[:MAX_ERRORS]:
            print(problem, file=sys.stderr)
        if len(error.problems) > MAX_ERRORS:
            say(f"error: {len(error.problems) - MAX_ERRORS} more problems. Fix: mend these first.")
    return error.code
