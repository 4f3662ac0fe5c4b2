"""One person's judgements: `annotation/NAME.jsonl`, append-only. Taking one back is a row of its own.

A row is durable before the page says so; a line torn by a kill is cut off when the file is opened again.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from macpo.annotation.design import Item, Showing
from macpo.annotation.study import Study, locked, whole_rows
from macpo.engine.errors import ConfigError, IntegrityError
from macpo.engine.files import Appender, explained
from macpo.engine.removal import is_file

Verdict = Literal["left", "right", "tie", "both-bad", "skip"]
MAX_COMMENT, MAX_SECONDS = 4000, 86_400.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Judgement(BaseModel):
    """What one person said about one item, shown once."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    row: Literal["judgement"] = "judgement"
    showing: str
    item: str
    swapped: bool
    """The second policy's response stood on the left."""
    repeat: bool
    verdict: Verdict
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] = ""
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] | None = None
    """From when the item was on the screen to the key, while the page was visible; None where it is not known."""
    at: str
    """When it was saved, UTC."""

    @property
    def outcome(self) -> int | None:
        """1 if the first policy is better, -1 if the second one is, 0 for a tie or both bad, None if skipped."""
        if self.verdict == "skip":
            return None
        if self.verdict in ("tie", "both-bad"):
            return 0
        return 1 if (self.verdict == "left") != self.swapped else -1


class _Undo(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    row: Literal["undo"] = "undo"
    showing: str


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    row: Literal["annotator"] = "annotator"
    name: str
    person: int | None
    """The place in the study; None for judgements that were imported."""
    study: str
    """SHA-256 of `items.json`."""
    source: str = "macpo"


class Session:
    """Context manager of one person's work in this process: what comes next, and what was said.

    Raises:
        ConfigError (2): a name that is no file name, another process that has the file, or no place left.
        IntegrityError (5): the file belongs to another study or has rows that do not fit it.
    """

    def __init__(self, study: Study, annotator: str) -> None:
        self.study, self.annotator = study, annotator
        self.path = study.folder / f"{annotator}.jsonl"
        if not NAME.fullmatch(annotator):
            raise ConfigError(f"got {annotator!r}", "use letters, digits, - and _, at most 64", field="--annotator")
        if os.path.lexists(self.path) and not is_file(self.path):
            raise ConfigError("not a file of judgements", "move it away", file=self.path)
        with contextlib.ExitStack() as opened:
            with locked(study.folder):
                opened.callback(os.close, self._lock())
                self._file = opened.enter_context(Appender(self.path))
                if not self._file.rows:
                    head = _Head(name=annotator, person=_free_place(study), study=study.digest)
                    self._file.add([head.model_dump()])
            head, judged = _replayed(study, self.path, _rows(self.path))
            self._resume(head, judged)
            self._opened = opened.pop_all()

    def _resume(self, head: _Head, judged: list[Judgement]) -> None:
        if head.person is None:
            fix = "choose another name with --annotator"
            raise ConfigError(f"{head.name} holds judgements from {head.source}", fix, file=self.path)
        self.showings = self.study.showings(head.person)
        self._judged = {each.showing: each for each in judged}
        if unknown := self._judged.keys() - {showing.id for showing in self.showings}:
            raise IntegrityError(f"showing {min(unknown)} is not in the study", "move the file away", file=self.path)

    def _lock(self) -> int:
        """A lock on the judgements themselves; filelock, without flock, would take them for somebody's lock file."""
        with explained(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise
            fix = "close it, or choose another name with --annotator"
            raise ConfigError(f"another process shows {self.annotator} the page", fix, file=self.path) from None

    @property
    def current(self) -> Showing | None:
        """The first item that is not judged; None at the end."""
        return next((showing for showing in self.showings if showing.id not in self._judged), None)

    @property
    def done(self) -> int:
        return len(self._judged)

    @property
    def total(self) -> int:
        return len(self.showings)

    def item(self, showing: Showing) -> Item:
        return self.study.items[showing.item]

    def judge(self, showing: Showing, verdict: str, comment: str = "", seconds: float | None = None) -> None:
        """Save what the person said of an item. Raises ValueError for what no judgement can hold."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        judgement = Judgement.model_validate(
            {
                "showing": showing.id,
                "item": showing.item,
                "swapped": showing.swapped,
                "repeat": showing.repeat,
                "verdict": verdict,
                "comment": comment,
                "seconds": seconds,
                "at": now,
            }
        )
        self._file.add([judgement.model_dump()])
        self._judged[showing.id] = judgement

    def undo(self) -> bool:
        """Take the last judgement back, so that its item comes again; return whether there was one."""
        if not self._judged:
            return False
        last = next(reversed(self._judged))
        self._file.add([_Undo(showing=last).model_dump()])
        del self._judged[last]
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def all_judgements(study: Study) -> dict[str, list[Judgement]]:
    """Return everybody's standing judgements by name, read without disturbing who is at work.

    Raises IntegrityError for a file that does not belong to the study or is not what was written.
    """
    return {path.stem: _replayed(study, path, _rows(path))[1] for path in _files(study)}


def write_imported(study: Study, name: str, source: str, judgements: Iterable[Judgement]) -> Path:
    """Write judgements that were made elsewhere as a person's file. Raises ConfigError where that file exists."""
    path = study.folder / f"{name}.jsonl"
    with locked(study.folder):
        if os.path.lexists(path):
            raise ConfigError("these judgements are here already", "move the file away to import them again", file=path)
        part = path.with_suffix(".jsonl.importing")  # no person's file until it is whole
        part.unlink(missing_ok=True)
        with Appender(part) as file:
            head = _Head(name=name, person=None, study=study.digest, source=source)
            file.add([head.model_dump(), *(judgement.model_dump() for judgement in judgements)])
        os.replace(part, path)
    return path


def _files(study: Study) -> list[Path]:
    return sorted(path for path in study.folder.glob("*.jsonl") if NAME.fullmatch(path.stem) and is_file(path))


def _free_place(study: Study) -> int:
    """The first place of the study that nobody has taken."""
    taken = {}
    for path in _files(study):
        if rows := _rows(path):
            head, _ = _replayed(study, path, rows[:1])
            if head.person is not None:
                taken[head.person] = path.stem
    free = [place for place in range(study.design.annotators) if place not in taken]
    if not free:
        names = ", ".join(taken[place] for place in sorted(taken))
        fix = "use one of their names, or move the folder away and begin again with more --annotators"
        raise ConfigError(f"the study has {names} as its people", fix, file=study.folder, field="--annotator")
    return free[0]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in whole_rows(path).splitlines()]
    except ValueError:
        raise IntegrityError("a line is not JSON", "move the file away", file=path) from None


def _replayed(study: Study, path: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[_Head, list[Judgement]]:
    """The head of a file and the judgements that stand at its end, in the order of time."""
    head: _Head | None = None
    standing: dict[str, Judgement] = {}
    for line, row in enumerate(rows, 1):
        try:
            if head is None:
                head = _Head.model_validate(row)
                if head.study != study.digest:
                    raise IntegrityError("belongs to another study", "move the file away", file=path)
            elif row.get("row") == "undo":
                del standing[_Undo.model_validate(row).showing]
            else:
                judgement = Judgement.model_validate(row)
                if judgement.item not in study.items or judgement.showing in standing:
                    raise ValueError
                standing[judgement.showing] = judgement
        except (ValidationError, ValueError, KeyError, AttributeError):
            raise IntegrityError("not a row that fits the study", "move the file away", file=path, line=line) from None
    if head is None:
        return _Head(name=path.stem, person=None, study=study.digest), []
    return head, list(standing.values())
