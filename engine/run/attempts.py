"""The commands that ran a folder's stages, `attempts.json`: when each began and ended, on what, and what was typed.

It stands outside every result. A kill leaves an attempt without an end, and a file that is torn or of another shape
costs a report some lines and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from macpo.engine.errors import MacpoError, Stopped
from macpo.engine.files import read_bytes, write_json
from macpo.engine.removal import make_way

log = logging.getLogger(__name__)

ATTEMPTS = "attempts.json"
COMMAND = "MACPO_COMMAND"
"""Environment variable with the command that was typed, for the processes that it starts."""
_CLOCK = "%Y-%m-%dT%H:%M:%SZ"
_OWN_FILES = ("cli.py", "__main__.py")


class Attempt(BaseModel):
    """One command that ran stages of a folder; times are UTC, and what is not known is empty or None."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    began: str
    ended: str | None = None
    """None while it runs, and after a kill."""
    seconds: float | None = None
    outcome: Literal["finished", "stopped", "failed"] | None = None
    command: str = ""
    device: str = ""
    processes: int = 1
    """That shared every stage."""
    jobs: int = 1
    """Stages that ran at once."""
    commit: str = ""
    versions: dict[str, str] = {}
    flop: dict[str, float] = {}
    """Stage -> the FLOP that the plan counted, where it could count them."""


class _Attempts(BaseModel):
    attempts: list[Attempt]


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The attempts in the order in which they began; empty where none was noted or the file is damaged."""
    path = run_dir / ATTEMPTS
    if not os.path.lexists(path):
        return []
    try:
        return _Attempts.model_validate_json(read_bytes(path)).attempts
    except (MacpoError, ValidationError) as error:
        why = error.problems[0].message if isinstance(error, MacpoError) else "it has another shape"
        log.warning("%s is ignored: %s", path, why)
        return []


def typed() -> str:
    """The command that was typed, as a shell would take it; a path to the program is its name alone."""
    given = os.environ.get(COMMAND)
    if given is not None:
        return given
    program = Path(next(iter(sys.argv), ""))  # a program that came through a pipe may have cleared it
    name = "macpo" if program.name in _OWN_FILES and program.parent.name == "macpo" else program.name
    return shlex.join([name or "python", *sys.argv[1:]])


@contextlib.contextmanager
def attempting(
    run_dir: Path, about: Callable[[], Mapping[str, Any]], say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Context of one attempt; it is noted when what this yields is called, and its end when the context ends.

    Args:
        about: the other fields of an Attempt.
    """
    before: list[Attempt] = []
    facts: Mapping[str, Any] = {}
    began, clock = "", 0.0

    def note(**end: Any) -> None:
        make_way(run_dir / ATTEMPTS, run_dir, say)
        this = Attempt.model_validate({**facts, "began": began, **end})
        write_json(run_dir / ATTEMPTS, {"attempts": [each.model_dump() for each in (*before, this)]})

    def begin() -> None:
        nonlocal before, began, clock, facts
        before, facts = read_attempts(run_dir), about()
        began, clock = time.strftime(_CLOCK, time.gmtime()), time.monotonic()
        note()

    def end(outcome: str) -> None:
        if began:
            seconds = round(time.monotonic() - clock, 3)
            note(ended=time.strftime(_CLOCK, time.gmtime()), seconds=seconds, outcome=outcome)

    try:
        yield begin
    except BaseException as error:
        with contextlib.suppress(MacpoError):  # the error goes first
            end("stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed")
        raise
    end("finished")
