"""Rows of a JSON document, read element by element: a list of objects, or such a list below a key of an object."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, NoReturn

from macpo.data.columns import KNOWN_COLUMNS
from macpo.data.folders import SPLIT_WORDS
from macpo.engine.errors import ConfigError, DataError, one_line
from macpo.engine.unpacking import Limits

_CHUNK_BYTES = 2**20
_LOOK_AHEAD = 64
_DECODER = json.JSONDecoder()


def json_rows(
    stream: IO[bytes], name: str, limits: Limits, key: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]] | None:
    """Return the objects of a list with their numbers from 1; None where the document is no list.

    With a key the document is an object, and the list is the value of that key.
    """
    document = _Document(stream, name, limits)
    if key is not None:
        return _below(document, key)
    return _numbered(document, name) if document.peek() == "[" else None


def wrapped_rows(stream: IO[bytes], name: str, split: str, limits: Limits) -> str | None:
    """Return the key of a JSON object under which the rows of the split are; None where each line is a row.

    Raises ConfigError where several keys hold lists of objects, or the only one is another split, and none is `split`.
    """
    document = _Document(stream, name, limits)
    if document.peek() != "{":
        return None
    keys: list[str] = []
    for key in document.names():
        if key in KNOWN_COLUMNS:
            return None  # the object is a row itself
        if document.peek() != "[":
            document.value()
            continue
        elements = document.items()
        first = next(elements, None)
        for _ in elements:
            pass
        if isinstance(first, dict) and not {"role", "from"} & first.keys():
            keys.append(key)
    if document.peek() or not keys:
        return None  # more objects follow
    if split in keys:
        return split
    if len(keys) == 1 and keys[0] not in SPLIT_WORDS:
        return keys[0]
    problem = f"no split {split!r} in {name!r}, whose keys {', '.join(keys)} hold rows"
    raise ConfigError(problem, f"use {' or '.join(keys)}", field="data.split")


def _numbered(document: _Document, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, value in enumerate(_behind(document.items()), 1):
        if not isinstance(value, dict):
            raise DataError("the row is not an object", "give a list of objects", file=name, line=number)
        yield number, value
    if document.peek():
        document.fail("more follows after the list", document.at)


def _behind(values: Iterator[Any]) -> Iterator[Any]:
    """Yield values some time after they are read, so that a broken file is mostly named before its rows are judged."""
    held: deque[Any] = deque()
    for value in values:
        held.append(value)
        if len(held) > _LOOK_AHEAD:
            yield held.popleft()
    yield from held


def _below(document: _Document, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for found in document.names():
        if found != key:
            document.value()
            continue
        for number, value in enumerate(document.items(), 1):
            if not isinstance(value, dict):
                document.fail(f"row {number} of {key!r} is not an object", document.at)
            yield number, value


class _Document:
    """JSON text that is read as far as it is needed; `at` is the position in the text that is held."""

    def __init__(self, stream: IO[bytes], name: str, limits: Limits) -> None:
        self._stream, self._name, self._max_bytes = stream, name, limits.row_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self.at, self._bytes, self._ended = "", 0, 0, False
        self._line, self._column = 1, 0  # of the beginning of the text that is held

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the next value. Raises DataError for invalid JSON and for a value beyond the limits."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if not (cut and self._more()):
                    self.fail(error.msg, error.pos)
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, absurd nesting
                self.fail(one_line(error, 100), self.at)
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self.at = end
            return value

    def names(self) -> Iterator[str]:
        """Yield the keys of an object; the caller reads the value of each."""
        self._take("{")
        while self.peek() != "}":
            if self.peek() != '"':
                self.fail("Expecting property name enclosed in double quotes", self.at)
            key = self.value()
            self._take(":")
            yield key
            if self.peek() != "}":
                self._take(",")
        self._take("}")

    def items(self) -> Iterator[Any]:
        """Yield the elements of a list."""
        self._take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() == "]":
                break
            self._take(",")
            if self.peek() == "]":
                self.fail("Expecting value", self.at)
        self._take("]")

    def fail(self, problem: str, at: int) -> NoReturn:
        before = self._text[:at]
        line = self._line + before.count("\n")
        column = at - before.rfind("\n") if "\n" in before else self._column + at + 1
        problem = f"invalid JSON at column {column}: {problem}"
        raise DataError(problem, "repair the file", file=self._name, line=line)

    def _take(self, char: str) -> None:
        if self.peek() != char:
            self.fail(f"Expecting {char!r}", self.at)
        self.at += 1

    def _more(self) -> bool:
        """Read on, more at a time the longer the value is; False where the end has been read before."""
        if self._ended:
            return False
        dropped, self._text, self.at = self._text[: self.at], self._text[self.at :], 0
        self._line += dropped.count("\n")
        self._column = len(dropped) - dropped.rfind("\n") - 1 if "\n" in dropped else self._column + len(dropped)
        if len(self._text) > self._max_bytes:
            problem = f"a value is longer than {self._max_bytes:,} bytes"
            raise DataError(problem, "give the rows as JSON Lines", file=self._name, line=self._line)
        try:
            raw = self._stream.read(max(_CHUNK_BYTES, len(self._text)))
        except DataError as error:  # the packed file holds too much
            raise DataError(problems=[replace(error.problems[0], line=self._line)]) from None
        held = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(raw, not raw)
        except UnicodeDecodeError as error:
            problem = f"invalid UTF-8 at byte {self._bytes - held + error.start}"
            raise DataError(problem, "save it as UTF-8", file=self._name) from None
        self._bytes += len(raw)
        self._ended = not raw
        return True
