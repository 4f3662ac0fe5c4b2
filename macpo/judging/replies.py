"""Every reply of a judge in one append-only file, by the question's key: what was answered is not asked again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from macpo.engine.files import Appender


def key_of(identity: Mapping[str, Any], question: str, vote: int = 0) -> str:
    """Hex SHA-256 of the question and of all that decides the reply to it."""
    text = json.dumps([identity, vote, question], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Replies:
    """The file, open for one process, whose threads may share it; a line that a kill tore is cut.

    Rows with a `verdict` or with `logps` answer their question; others are records of what went wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._lock = Appender(path), threading.Lock()
        self._known: dict[str, dict[str, Any]] = {}
        self._unparsed: Counter[str] = Counter()
        for row in self._file.rows:
            self._note(row)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row that answers the question; None where it has to be asked."""
        return self._known.get(key)

    def unparsed(self, key: str) -> int:
        """How many replies to the question named no single verdict."""
        return self._unparsed[key]

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows, which are on disk when this returns."""
        with self._lock:
            self._file.add(rows)
            for row in rows:
                self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        key = str(row.get("key"))
        if row.get("verdict") or row.get("logps"):
            self._known[key] = row
        elif "reply" in row:
            self._unparsed[key] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
