"""The errors that users see: one line each with a remedy, and an exit code per kind.

error: FILE:LINE: FIELD: problem. Fix: remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, its place, and its remedy."""

    message: str
    fix: str = ""
    file: str = ""
    line: int | None = None
    field: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        head = ": ".join(part for part in ("error", where, self.field) if part)
        text = f"{head}: {self.message.rstrip('.')}."
        return f"{text} Fix: {self.fix.rstrip('.')}." if self.fix else text


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
