"""The end of every command: errors as one line each on stderr, and the exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from macpo.engine.errors import MAX_CHARS, MacpoError, Stopped, is_failure, printable
from macpo.engine.files import explain, is_expected
from macpo.engine.processes import Terminated, ended_by_sigterm, forget_ctrl_c

MAX_ERRORS = 100
"""Problems of one command that are printed."""


class _OneLine(logging.Formatter):
    """Log lines, which may name files, models and keys of other people."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), 2 * MAX_CHARS)


def say(text: str, *, error: bool = True) -> None:
    """Print one line, on standard error or standard output; what would control the terminal is escaped."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def run_cli(
    command: Callable[[], Any], *, debug: bool = False, report: Callable[[BaseException, str], bool] | None = None
) -> int:
    """Call the command, print its error and return the exit code.

    A MacpoError prints its lines and gives its code; a full disk gives 4, a place that cannot be written 2, Ctrl-C and
    SIGTERM 75, anything unexpected 1. `debug` adds the traceback. An error that another rank reports is not printed
    again. `report` gets the error and, for an unexpected one, its text; if it returns True, the error is reported
    elsewhere.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    try:
        with ended_by_sigterm():
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
