"""Records by prompt: distinct prompts in a seeded order, and which records repeat or contradict one another.

Records are held by number (macpo/data/spool.py), so a million of them need little memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from macpo.data.spool import Ids, Indices, R, Records
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Pair


class Prompts(Generic[R]):
    """Records grouped by prompt; the prompts are ordered by a hash of seed and prompt.

    The order depends on neither the order of the records nor other prompts; a prompt keeps its records in their order.
    """

    def __init__(self, records: Records[R], seed: int, without: Ids | None = None) -> None:
        """`without`: prompts that are left out."""
        ids, group_of = np.unique(records.ids, return_inverse=True)
        digests = b"".join(hashlib.sha256(f"{seed}:{number:016x}".encode()).digest() for number in ids.tolist())
        words = np.frombuffer(digests, ">u8").reshape(-1, 4)
        order = np.lexsort(words.T[::-1])
        if without is not None:
            order = order[~np.isin(ids[order], without)]
        rank = np.full(len(ids), len(ids), np.int64)
        rank[order] = np.arange(len(order))
        rank_of = rank[group_of]
        by_prompt = np.argsort(rank_of, kind="stable")
        self._records: Records[R] = records
        self._ends = np.searchsorted(rank_of[by_prompt], np.arange(len(order) + 1))
        self._indices: Indices = by_prompt[: self._ends[-1]]
        self.ids: Ids = ids[order]
        """The prompts' ids in their order."""

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, start: int, end: int) -> Records[R]:
        """Return the first record of each of the prompts from `start` to before `end`."""
        return self._records.take(self._indices[self._ends[:-1][start:end]])

    def every(self, start: int, end: int | None = None) -> Records[R]:
        """Return all records of the prompts from `start` to before `end`, or to the last."""
        last = len(self) if end is None else min(end, len(self))
        return self._records.take(self._indices[self._ends[min(start, last)] : self._ends[last]])


class Repeats:
    """Which records say the same again, and which pairs of responses are preferred both ways."""

    def __init__(self) -> None:
        # The prompt's id and the hashes of the two texts: with 64 bits each, no two of any number of rows agree by
        # chance. Python's hashes are keyed by process, so nobody can write rows that do.
        self._ids, self._low, self._high = array("Q"), array("q"), array("q")
        self._flipped = bytearray()

    def add(self, record: Pair | Example) -> None:
        """Take the next record."""
        if isinstance(record, Example):
            low, high, flipped = "", _text(record.response, record.parts), False
        else:
            chosen, rejected = _text(record.chosen, record.chosen_parts), _text(record.rejected, record.rejected_parts)
            flipped = chosen > rejected
            low, high = (rejected, chosen) if flipped else (chosen, rejected)
        self._ids.append(int(record.prompt.id, 16))
        self._low.append(hash(low))
        self._high.append(hash(high))
        self._flipped.append(flipped)

    def found(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which records repeat an earlier one, and which are contradicted by another."""
        if not self._flipped:
            return np.zeros(0, np.bool_), np.zeros(0, np.bool_)
        columns = (self._ids, self._low, self._high)
        digests = np.stack([np.frombuffer(column.tobytes(), np.uint64) for column in columns])
        flipped = np.frombuffer(bytes(self._flipped), np.uint8)
        order = np.lexsort((flipped, *digests))  # stable: an earlier record stays before its repetition
        changes = (np.diff(digests[:, order]) != 0).any(0)
        new_set = np.concatenate(([True], changes))
        new = new_set | np.concatenate(([True], flipped[order][1:] != flipped[order][:-1]))
        set_of = np.cumsum(new_set) - 1
        both = np.bincount(set_of, weights=new) > 1
        repeated, contradicted = np.empty(len(order), np.bool_), np.empty(len(order), np.bool_)
        repeated[order], contradicted[order] = ~new, both[set_of]
        return repeated, contradicted


def _text(response: str, parts: Message | None) -> str:
    """Return a response as one text."""
    return response if parts is None else json.dumps(parts, sort_keys=True)


def ids_of(parts: Sequence[Records[R]]) -> Ids:
    """Return the prompts' ids of several sets of records."""
    return np.concatenate([part.ids for part in parts]) if parts else np.zeros(0, np.uint64)
