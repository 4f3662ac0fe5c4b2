"""The errors that users see: one line each with a remedy, and an exit code per kind.

error: FILE:LINE: FIELD: problem. Fix: remedy.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_CHARS = 500
"""Longest line of an error; longer parts lose their middle."""
_JOINERS = "\u200c\u200d"  # of letters in Persian and of emoji: they turn nothing around and end no line


def printable(text: str, limit: int | None = None) -> str:
    """The text on one line, as a person may see it: what controls a terminal, ends a line or turns text is escaped.

    Args:
        limit: number of characters above which the middle is left out; None sets none.
    """
    if not text.isprintable():
        text = "".join(
            each if each.isprintable() or each in _JOINERS or unicodedata.category(each) == "Zs" else _escaped(each)
            for each in (text if limit is None else _cut(text, 4 * limit))
        )
    return text if limit is None else _cut(text, limit)


def is_failure(error: BaseException) -> bool:
    """Whether an error is one of the work itself: an Exception, or a panic of a library in Rust, which is none.

    Ctrl-C, SIGTERM (processes.Terminated) and SystemExit are not, and go on to whoever waits for them.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown(value: object, limit: int = 60) -> str:
    """A value of a recipe or of data as JSON has it, its end left out where it is longer than `limit` characters."""
    try:
        return beginning(json.dumps(value, ensure_ascii=False, default=str), limit)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, a circle, a thousand brackets
        return f"a {type(value).__name__}"


def one_line(problem: object, limit: int = 200) -> str:
    """What another library says of an error, on one line of at most `limit` characters."""
    said = beginning(" ".join(str(problem).split()), limit)
    return said or (type(problem).__name__ if isinstance(problem, BaseException) else "")


def beginning(text: str, limit: int) -> str:
    """The beginning of a text, at most `limit` characters, cut between words where they are not very long."""
    return text if len(text) <= limit else _head(text, limit - 1) + "…"


def _cut(text: str, limit: int) -> str:
    """The text without its middle."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{_head(text, limit - 1 - tail)}…{_head(text[::-1], tail)[::-1]}"


def _head(text: str, limit: int) -> str:
    """The first `limit` characters, without a word that goes on, unless it makes up half of them."""
    head = text[:limit]
    whole = head if text[limit : limit + 1].isspace() else head.rpartition(" ")[0]
    return whole if len(whole) > limit // 2 else head


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, its place, and its remedy."""

    message: str
    fix: str = ""
    file: str = ""
    line: int | None = None
    field: str = ""

    def __str__(self) -> str:
        said = f"--set {self.field}=" in f"{self.file}=" or self.message.startswith(f"{self.field} ")  # named anyway
        texts = (self.file, "" if said else self.field, self.message.rstrip("."), self.fix.rstrip("."))
        parts = [printable(text, MAX_CHARS) for text in texts]
        room = MAX_CHARS - len(f"error: :{self.line}: :. Fix: .")
        if sum(map(len, parts)) > room:
            longest = next(n for n in range(room, 0, -1) if sum(min(len(part), n) for part in parts) <= room)
            parts = [_cut(part, longest) for part in parts]
        file, field, message, fix = parts
        where = f"{file}:{self.line}" if file and self.line else file
        head = ": ".join(part for part in ("error", where, field) if part)
        return f"{head}: {message}. Fix: {fix}." if fix else f"{head}: {message}."


class MacpoError(Exception):
    """Base of every expected failure.

    Attributes:
        code: exit code of the process.
        relayed: another process reports this error to the user, so this one does not.
    """

    code = 1

    def __init_subclass__(cls, code: int | None = None) -> None:
        cls.code = cls.code if code is None else code

    def __init__(
        self,
        message: str = "",
        fix: str = "",
        *,
        file: str | Path = "",
        line: int | None = None,
        field: str = "",
        problems: Sequence[Problem] | None = None,
        relayed: bool = False,
    ) -> None:
        self.relayed = relayed
        self.problems = tuple(problems) if problems else (Problem(message, fix, str(file), line, field),)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[object, ...]:  # so that it can be pickled
        return _rebuild, (type(self), self.problems)


def _rebuild(kind: type[MacpoError], problems: tuple[Problem, ...]) -> MacpoError:
    return kind(problems=problems)


class ConfigError(MacpoError, code=2):
    """The recipe or the command line is wrong."""


class DataError(MacpoError, code=3):
    """An input row or file cannot be used."""


class TemplateRefusal(DataError):
    """A chat template does not write a dialogue, or would not write it as it is trained on."""


class ResourceError(MacpoError, code=4):
    """Not enough disk or memory."""


class IntegrityError(MacpoError, code=5):
    """Something written earlier no longer verifies."""


class NumericsError(MacpoError, code=6):
    """A loss or gradient is not finite."""


class Again(ResourceError, code=76):
    """This attempt cannot continue, but the next one can: a launcher restarts the job at once."""


class PeerError(MacpoError, code=7):
    """Another process of the job failed or hangs."""


class Stopped(MacpoError, code=75):
    """Stopped on request; the same command resumes."""
