"""Records that need not fit in memory: written once to a temporary file, read back one at a time.

    spool = Spool(Pair)
    spool.add(pair, "rows.jsonl", 7)
    pairs = whole(spool)
    pairs[5], pairs.where(5), len(pairs)        # a pair, (file, line), number of pairs

Only numbers stay in memory, about 60 bytes a record. Up to SPOOL_BYTES of text do too; more goes to the folder that the
environment variable TMPDIR names.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.files import explained

SPOOL_BYTES = 64 * 2**20
"""Text that is kept in memory."""

T = TypeVar("T")
R = TypeVar("R", Pair, Example)
Indices: TypeAlias = NDArray[np.int64]
Ids: TypeAlias = NDArray[np.uint64]


class View(Sequence[T]):
    """A sequence whose elements are made when they are asked for; equal to any sequence of the same elements."""

    @abstractmethod
    def at(self, index: int) -> T:
        """Return the element at an index from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.at(index % len(self))

    def __iter__(self) -> Iterator[T]:
        return (self.at(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Spool(Generic[R]):
    """Records in a temporary file, in the order in which they were added."""

    def __init__(self, kind: type[R]) -> None:
        self._kind: Any = kind
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, prefix="macpo-")  # noqa: SIM115 - as long as self
        weakref.finalize(self, self._file.close)
        self._at_end = True
        self._ends, self._ids = array("Q", [0]), array("Q")
        self._files: list[str] = []
        self._file_of, self._lines = array("I"), array("Q")
        self._begins, self._begin_of = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, record: R, file: str = "", line: int = 0) -> None:
        """Append a record that comes from this file and line. Raises ResourceError where the disk is full."""
        raw = json.dumps(record.to_json(), ensure_ascii=False).encode()
        with explained(tempfile.gettempdir()):
            if not self._at_end:  # a seek writes what is buffered
                self._file.seek(self._ends[-1])
                self._at_end = True
            self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))
        self._ids.append(id_number(record.prompt))
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._file_of.append(len(self._files) - 1)
        self._lines.append(line)
        for prompt in beginnings(record.prompt):
            self._begins.append(id_number(prompt))
            self._begin_of.append(len(self) - 1)

    def at(self, index: int) -> R:
        """Return the record that was added at this place."""
        start, end = self._ends[index], self._ends[index + 1]
        with explained(tempfile.gettempdir()):
            self._file.seek(start)
            self._at_end = False
            raw = self._file.read(end - start)
        record: R = self._kind.from_json(json.loads(raw))
        return record

    @property
    def ids(self) -> Ids:
        """The prompts' ids as numbers, one a record."""
        return np.frombuffer(self._ids.tobytes(), np.uint64)

    def where(self, index: int) -> tuple[str, int]:
        """Return file and line of a record's row; ("", 0) for a record that comes from none."""
        return self._files[self._file_of[index]], self._lines[index]

    def beginning_with(self, ids: Ids) -> Indices:
        """Return the records whose prompt, a dialogue, begins with one of these prompts and goes on."""
        found = np.isin(np.frombuffer(self._begins.tobytes(), np.uint64), ids)
        return np.unique(np.frombuffer(self._begin_of.tobytes(), np.int64)[found])


class Records(View[R], Generic[R]):
    """Some of the records of a spool, in an order of their own."""

    def __init__(self, spool: Spool[R], indices: Indices) -> None:
        self._spool, self._indices = spool, indices

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, index: int) -> R:
        return self._spool.at(int(self._indices[index]))

    @property
    def ids(self) -> Ids:
        """The prompts' ids as numbers, one a record."""
        return self._spool.ids[self._indices]

    def where(self, index: int) -> tuple[str, int]:
        """Return file and line of a record's row; ("", 0) for a record that comes from none."""
        return self._spool.where(int(self._indices[index]))

    def beginning_with(self, ids: Ids) -> int:
        """Count the records whose prompt, a dialogue, begins with one of these prompts and goes on."""
        return int(np.isin(self._indices, self._spool.beginning_with(ids)).sum())

    def take(self, indices: Indices) -> Records[R]:
        """Return some of these records."""
        return Records(self._spool, self._indices[indices])


def spooled(records: Iterable[R], kind: type[R]) -> Records[R]:
    """Return records that come from no file."""
    spool: Spool[R] = Spool(kind)
    for record in records:
        spool.add(record)
    return whole(spool)


def whole(spool: Spool[R]) -> Records[R]:
    """Return all records of a spool."""
    return Records(spool, np.arange(len(spool), dtype=np.int64))


def id_number(prompt: Prompt) -> int:
    return int(prompt.id, 16)


def beginnings(prompt: Prompt) -> Iterator[Prompt]:
    """Yield the shorter dialogues with which a prompt begins and that are prompts themselves."""
    for end in range(1, len(prompt.messages)):
        if prompt.messages[end - 1]["role"] == "user":
            yield Prompt.of(prompt.messages[:end])
