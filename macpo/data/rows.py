"""Where rows come from: a file or folder in the forms of macpo/data/readers.py and folders.py, or the Hub.

    for row in Source("hh-rlhf", split="test", subset="harmless-base").rows(): ...

Nothing but the Hub's client needs a network, and it is asked for only where the path does not exist here.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from macpo.data.columns import mapping_line
from macpo.data.folders import SUFFIXES, data_files, files_of
from macpo.data.readers import DELIMITERS, file_rows
from macpo.data.stringified import TEXT_FIELDS, messages_in
from macpo.engine.errors import ConfigError, DataError, one_line
from macpo.engine.files import sha256
from macpo.engine.paths import expanded
from macpo.engine.unpacking import LIMITS, Limits

OFFLINE_FIX = "check the path; without a network download the data first and give its folder"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class EmptyText(DataError):
    """A prompt or response without text, which `data.empty: drop` leaves out."""


@dataclass(slots=True)
class Row:
    """One object of a data file; `line` counts from 1 (rows of .json lists, .parquet and the Hub likewise)."""

    file: str
    line: int
    fields: dict[str, Any]

    @property
    def untyped(self) -> bool:
        """Whether every field is text, whatever it stands for, as in CSV."""
        return self.file.removesuffix(".gz").endswith((*DELIMITERS,))

    def fail(self, field: str, problem: str, fix: str = "", kind: type[DataError] = DataError) -> NoReturn:
        """Raise a DataError that names the file, line, field and the row's keys."""
        raise self._error(kind, field, problem, fix or f"correct the row, or map the name: {self.mapping(field)}")

    def missing(self, field: str, problem: str, *also: str) -> NoReturn:
        """Raise a DataError for fields that are missing, with the setting that maps likely ones."""
        raise self._error(DataError, field, problem, f"correct the row, or map the name: {self.mapping(field, *also)}")

    def mapping(self, *fields: str) -> str:
        return mapping_line(fields, self.fields.keys())

    def _error(self, kind: type[DataError], field: str, problem: str, fix: str) -> DataError:
        keys = ", ".join(map(str, list(self.fields)[:12])) or "none"
        return kind(f"{problem} (keys seen: {keys})", fix, file=self.file, line=self.line, field=field)


@dataclass(frozen=True, slots=True)
class Source:
    """Which rows are read, and under which names."""

    path: str | Path
    """A file, a folder or a Hub id."""
    split: str = "train"
    subset: str | None = None
    """One sub-folder; None reads all of them."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """{our name: name in the data}."""
    max_rows: int | None = None
    """Number of rows to read from the start; None reads all."""
    limits: Limits = LIMITS
    """What a file may ask for."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, columns renamed and messages that are stored as text read.

        Raises as `read_rows` does, and DataError for a missing column or for text that begins like messages.
        """
        for row in itertools.islice(read_rows(self.path, self.split, self.subset, self.limits), self.max_rows):
            if self.columns:
                for ours, theirs in self.columns.items():
                    if theirs not in row.fields:
                        problem = f"data.columns names it for {ours!r}, but it is missing"
                        row.fail(theirs, problem, "correct data.columns")
                row.fields = row.fields | {ours: row.fields[theirs] for ours, theirs in self.columns.items()}
            for name, value in row.fields.items():
                if name in TEXT_FIELDS and isinstance(value, str) and value[:64].lstrip()[:1] in ("[", "{"):
                    _read_messages(row, name, value)
            yield row


def _read_messages(row: Row, field: str, text: str) -> None:
    try:
        messages = messages_in(text)
    except ValueError as problem:
        row.fail(field, str(problem), "store the messages as a list, or write the list as JSON")
    if messages is not None:
        row.fields = row.fields | {field: messages}


def read_rows(
    path: str | Path, split: str = "train", subset: str | None = None, limits: Limits = LIMITS
) -> Iterator[Row]:
    """Yield every row of a file, a folder or a Hub data set, files in order of their names.

    Raises ConfigError for a missing path, split or subset, or a Hub that cannot be reached; DataError for bad rows.
    """
    if is_local(path):
        for file in data_files(expanded(path), split, subset):
            name = str(file)
            for number, fields in file_rows(file, split, limits):
                yield Row(name, number, fields)
    else:
        yield from _hub_rows(str(path), split, subset)


def in_words(counts: Mapping[str, int]) -> str:
    """What was dropped or repeated, for people: `2 duplicate prompts, 1 empty dropped`."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 (hex) of names and contents of all data files below `path`; for a Hub id its commit.

    Raises ConfigError where the path is missing, or the Hub cannot be reached and nothing is cached.
    """
    digest = hashlib.sha256()
    if is_local(path):
        root = expanded(path)
        files = [root] if root.is_file() else files_of(root)
        if not files:
            raise ConfigError(f"no data file in {str(path)!r}", f"use {', '.join(SUFFIXES)}", field="data.path")
        for file in files:
            digest.update(f"{file.relative_to(root).as_posix()}\0{sha256(file)}\n".encode())
    else:
        digest.update(f"{path}\0{_hub_commit(str(path))}".encode())
    return digest.hexdigest()


def is_local(path: str | Path) -> bool:
    """Return whether the path exists here; False for a possible Hub id. Raise ConfigError for anything else."""
    if expanded(path).exists():
        return True
    text = str(path)
    if isinstance(path, Path) or not _HUB_ID.fullmatch(text) or text.endswith((*SUFFIXES, ".txt", ".gz")):
        raise ConfigError(f"no file or folder {text!r}", OFFLINE_FIX, field="data.path")
    return False


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as problem:
        raise ConfigError("data from the Hub needs `datasets`", "pip install datasets", field="data.path") from problem
    commit = _hub_commit(name)  # fails at once where the Hub is out of reach, and pins what `fingerprint` names
    try:
        try:
            rows = load_dataset(name, subset, split=split, revision=commit)
        except ValueError:
            if subset is None:
                raise  # no such configuration: HH-RLHF's subsets are folders instead
            rows = load_dataset(name, data_dir=subset, split=split, revision=commit)
    except Exception as problem:  # datasets, huggingface_hub and the HTTP client raise types of their own
        said = one_line(problem, 150)
        fix = "check data.path, data.split and data.subset; without a network give a folder"
        raise ConfigError(f"{name!r} does not load from the Hub: {said}", fix, field="data.path") from problem
    for number, fields in enumerate(rows, 1):
        yield Row(name, number, dict(fields))


def _hub_commit(name: str) -> str:
    """Return the newest commit of a Hub data set; offline, the one that was downloaded last."""
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().dataset_info(name, timeout=10).sha)
    except Exception as problem:  # no network, no such data set, offline mode: each with a type of its own
        cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
        snapshots = sorted(cache.iterdir(), key=lambda p: p.stat().st_mtime) if cache.is_dir() else []
        if snapshots:
            return snapshots[-1].name
        said = one_line(problem, 150)
        raise ConfigError(
            f"{name!r} is no local path and the Hub does not answer: {said}", OFFLINE_FIX, field="data.path"
        ) from problem
