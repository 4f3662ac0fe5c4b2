"""Records that need not fit in memory: written once to a temporary file, read back one at a time.

    spool = Spool(Pair)
    spool.add(pair)
    pairs = whole(spool)
    pairs[5], pairs[5].prompt.origin, len(pairs)        # a pair, (file, line), number of pairs

Only numbers stay in memory, about 45 bytes a record. The text goes to the folder that the environment variable TMPDIR
names; the file has no name there and is gone when the records are, also after a kill.
"""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Pair, Prompt, prompt_id
from macpo.engine.errors import DataError
from macpo.engine.files import explain, explained

_BUFFER_BYTES = 2**20
_FORMAT = 2  # of marshal: the last one without references, which cost more than they save here

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
    """Prompts with one or two human responses in a temporary file, in the order in which they were added."""

    def __init__(self, kind: type[R]) -> None:
        """`kind`: Example for one response each, Pair for two, chosen and rejected."""
        self._make: Any = _example if kind is Example else _pair
        with explained(tempfile.gettempdir()):
            self._file = tempfile.TemporaryFile(prefix="macpo-", buffering=0)  # noqa: SIM115 - lives as long as self
        weakref.finalize(self, self._file.close)
        self._unwritten: list[bytes] = []
        self._written = 0
        self._ends, self._ids = array("Q", [0]), array("Q")
        self._files: list[str] = []
        self._file_of, self._lines = array("I"), array("Q")
        self._begins, self._begin_of = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, record: R) -> None:
        """Append a record. Raises ResourceError where the disk is full, DataError for absurd nesting."""
        prompt = record.prompt
        parts: tuple[Any, ...]
        if isinstance(record, Example):
            parts = (record.response, record.parts)
        else:
            pair: Pair = record
            parts = (pair.chosen, pair.rejected, pair.chosen_parts, pair.rejected_parts, pair.margin)
        try:
            raw = marshal.dumps((prompt.messages, *parts), _FORMAT)
        except ValueError as error:
            where, line = prompt.origin or ("", None)
            problem = f"a message cannot be kept ({error})"
            raise DataError(problem, "give plain text, numbers, lists and objects", file=where, line=line) from None
        self._unwritten.append(raw)
        self._ends.append(end := self._ends[-1] + len(raw))
        if end - self._written > _BUFFER_BYTES:
            self._write()
        self._ids.append(int(prompt.id, 16))
        file, line = prompt.origin or ("", 0)
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._file_of.append(len(self._files) - 1)
        self._lines.append(line)
        if len(prompt.messages) > 1:
            for shorter in beginnings(prompt):
                self._begins.append(int(shorter, 16))
                self._begin_of.append(len(self) - 1)

    def at(self, index: int) -> R:
        """Return the record that was added at this place."""
        if self._unwritten:
            self._write()
        start, end = self._ends[index], self._ends[index + 1]
        try:
            raw = os.pread(self._file.fileno(), end - start, start)
        except OSError as error:
            raise explain(error, tempfile.gettempdir()) from error
        messages, *responses = marshal.loads(raw)
        file, line = self._files[self._file_of[index]], self._lines[index]
        prompt = Prompt(f"{self._ids[index]:016x}", messages, (file, line) if line else None)
        return self._make(prompt, *responses)

    def _write(self) -> None:
        with explained(tempfile.gettempdir()):
            view = memoryview(b"".join(self._unwritten))
            while view:
                view = view[self._file.write(view) :]
        self._unwritten, self._written = [], self._ends[-1]

    @property
    def ids(self) -> Ids:
        """The prompts' ids as numbers, one a record."""
        return np.frombuffer(self._ids.tobytes(), np.uint64)

    def beginning_with(self, ids: Ids) -> Indices:
        """Return the records whose prompt, a dialogue, begins with one of these prompts and goes on."""
        found = np.isin(np.frombuffer(self._begins.tobytes(), np.uint64), ids)
        return np.unique(np.frombuffer(self._begin_of.tobytes(), np.int64)[found])


class Records(View[R], Generic[R]):
    """Some of the records of a spool, in an order of their own."""

    def __init__(self, spool: Spool[R], indices: Indices) -> None:
        self._spool: Spool[R] = spool
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[R]:
        return map(self._spool.at, self._indices.tolist())

    def at(self, index: int) -> R:
        return self._spool.at(int(self._indices[index]))

    @property
    def ids(self) -> Ids:
        """The prompts' ids as numbers, one a record."""
        return self._spool.ids[self._indices]

    def beginning_with(self, ids: Ids) -> int:
        """Count the records whose prompt, a dialogue, begins with one of these prompts and goes on."""
        return int(np.isin(self._indices, self._spool.beginning_with(ids)).sum())

    def take(self, indices: Indices) -> Records[R]:
        """Return some of these records."""
        return Records(self._spool, self._indices[indices])


def spooled(records: Sequence[R], kind: type[R]) -> Records[R]:
    """Return records that come from no file. Raises ValueError for those that are not human responses and no more."""
    spool: Spool[R] = Spool(kind)
    for record in records:
        spool.add(record)
    kept = whole(spool)
    if kept != records:
        raise ValueError("a spool holds prompts and human responses alone")
    return kept


def whole(spool: Spool[R]) -> Records[R]:
    """Return all records of a spool."""
    return Records(spool, np.arange(len(spool), dtype=np.int64))


def _example(prompt: Prompt, response: str, parts: Message | None) -> Example:
    return Example(prompt, response, parts=parts)


def _pair(prompt: Prompt, chosen: str, rejected: str, *more: Any) -> Pair:
    return Pair(prompt, chosen, rejected, chosen_parts=more[0], rejected_parts=more[1], margin=more[2])


def beginnings(prompt: Prompt) -> Iterator[str]:
    """Yield the ids of the shorter dialogues with which a prompt begins and that are prompts themselves."""
    for end in range(1, len(prompt.messages)):
        if prompt.messages[end - 1]["role"] in ("user", "tool"):
            yield prompt_id(prompt.messages[:end])
