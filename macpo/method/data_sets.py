"""The rows that a recipe's data block names, read with all its settings: the one way to them."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from macpo.data.examples import load_examples
from macpo.data.folders import data_files, has_split
from macpo.data.preferences import load_preferences
from macpo.data.prompts import ids_of
from macpo.data.rows import Source, is_local
from macpo.data.spool import Records, View
from macpo.data_settings import SourceSettings
from macpo.engine.data.records import Example, Pair
from macpo.engine.errors import ConfigError
from macpo.engine.paths import expanded

log = logging.getLogger("macpo.data")

R = TypeVar("R", Pair, Example)
Counts = dict[str, int]

PACKED = {".gz": 3, ".parquet": 2}
"""How many times its size a file's rows take, about."""


def read_pairs(data: SourceSettings, source: Source | None = None) -> tuple[Records[Pair], Counts]:
    """Return the pairs of a source, by default of the data block's own, and counts."""
    return load_preferences(source or source_of(data), **_settings(data), margin=getattr(data, "margin", None))


def read_examples(data: SourceSettings, source: Source | None = None) -> tuple[Records[Example], Counts]:
    """Return the examples of a source, by default of the data block's own, and counts."""
    return load_examples(source or source_of(data), **_settings(data))


Reader = Callable[[SourceSettings, Source], tuple[Records[Any], Counts]]
"""`read_pairs` or `read_examples`."""


def num_prompts(data: SourceSettings, read: Reader, source: Source | None, enough: int) -> int:
    """Return the number of distinct prompts of a source, by default the data block's own; a lower one from `enough` on.

    No more of the source is read than that takes. Raises as reading does.
    """
    rows, level = 2 * enough, log.level
    log.setLevel(logging.ERROR)  # what is dropped is said by who reads the data to use it
    try:
        while True:
            records, counts = read(data, replace(source or source_of(data), max_rows=rows))
            found = len(np.unique(records.ids))
            if found >= enough or counts["rows"] < rows:
                return found
            rows *= 4
    finally:
        log.setLevel(level)


def source_of(data: SourceSettings, max_rows: int | None = None) -> Source:
    """Return the source of the rows that are trained on."""
    assert data.path is not None
    return Source(data.path, data.split, data.subset, data.columns, max_rows, limits=data.limits.limits)


def judged_rows(source: Source, rows: Sequence[Pair | Example], counts: Counts) -> int:
    """Return how many rows a source has, by the size of its files, from its first `source.max_rows` ones.

    Of the Hub's only those that were read count.
    """
    if counts["rows"] < (source.max_rows or 0) or not is_local(source.path):
        return len(rows)
    files = data_files(Path(source.path).expanduser(), source.split, source.subset)
    size = sum(file.stat().st_size * PACKED.get(file.suffix, 1) for file in files if file.is_file())
    each = statistics.fmean(len(json.dumps(row.to_json())) for row in rows)
    return max(len(rows), round(size / each))


def own_source(data: SourceSettings, path: str) -> Source:
    """Return the source of a teacher's own rows; a single file is read whole."""
    if expanded(path).is_file():
        return Source(path, columns=data.columns, limits=data.limits.limits)
    return Source(path, data.split, data.subset, data.columns, limits=data.limits.limits)


def held_out_source(data: SourceSettings) -> Source | None:
    """Return the source of the test rows; None where they are a part of the rows that are read for training.

    `subset` and `split` hold for `test_path` too, unless it is a single file; a folder without the split gives `test`.
    Raises ConfigError where `path` is a single file that cannot hold another split.
    """
    if data.test_path is not None:
        source = own_source(data, data.test_path)
        folder = expanded(data.test_path)
        if folder.is_dir() and not has_split(folder, source.split, source.subset):
            return replace(source, split="test")
        return source
    path = expanded(str(data.path))
    if data.test_split is not None and path.is_file() and ".json" not in path.suffixes[:1]:
        fix = "give the folder of both splits in data.path, or the other file in data.test_path"
        raise ConfigError(f"data.path is a file: it has no split {data.test_split!r}", fix, field="data.test_split")
    return None if data.test_split is None else replace(source_of(data), split=data.test_split)


def count_overlap(counts: Counts, test: Records[R], training: Iterable[Records[R]]) -> None:
    """Count and report the training prompts, dialogues all, that begin with a test prompt and go on."""
    ids = ids_of([test])
    found = sum(records.beginning_with(ids) for records in training)
    if found:
        counts["training_begins_with_test_prompt"] = found
        log.warning("%d training prompts begin with a test prompt: what answered it may be in them", found)


def count_dropped(counts: Counts, of: Counts, prefix: str) -> None:
    """Add what was dropped of another source to the counts, under a prefix."""
    counts |= {f"{prefix}_{name}": n for name, n in of.items() if n and name.endswith("_dropped")}


class Documents(View[Example]):
    """Records as documents to pretrain on: a pair is two, one for each response."""

    def __init__(self, records: Records[Any]) -> None:
        self._records = records
        self._pairs = len(records) > 0 and isinstance(records[0], Pair)

    def __len__(self) -> int:
        return len(self._records) * (1 + self._pairs)

    def at(self, index: int) -> Example:
        if not self._pairs:
            example: Example = self._records[index]
            return example
        pair: Pair = self._records[index // 2]
        return Example(pair.prompt, pair.rejected if index % 2 else pair.chosen)


def _settings(data: SourceSettings) -> dict[str, Any]:
    names = ("format", "preference", "empty", "contradictions")
    return {name: getattr(data, name) for name in names}
