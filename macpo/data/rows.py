"""Where preference rows come from: .jsonl, .json, .parquet (also gzipped), folders of them, or the Hub.

A folder holds one file a published split, itself or in one sub-folder a subset, as HH-RLHF is published:

    hh-rlhf/harmless-base/train.jsonl.gz   hh-rlhf/harmless-base/test.jsonl.gz   hh-rlhf/helpful-base/…
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from macpo.engine.errors import ConfigError, DataError
from macpo.engine.files import explained, read_jsonl, sha256

log = logging.getLogger("macpo.data")

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
OFFLINE_FIX = "check the path; without a network download the data first and give its folder"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file; `line` counts from 1 (rows of .json lists, .parquet and the Hub likewise)."""

    file: str
    line: int
    fields: dict[str, Any]

    def fail(self, field: str, problem: str, fix: str = "") -> NoReturn:
        """Raise a DataError that names the file, line, field and the row's keys."""
        keys = ", ".join(map(str, list(self.fields)[:12])) or "none"
        fix = fix or f"correct the row, or map the name: data.columns: {{{field}: NAME}}"
        raise DataError(f"{problem} (keys seen: {keys})", fix, file=self.file, line=self.line, field=field)


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

    def rows(self) -> Iterator[Row]:
        """Yield the rows, columns renamed. Raises as `read_rows` does, and DataError for a missing column."""
        for row in itertools.islice(read_rows(self.path, self.split, self.subset), self.max_rows):
            for ours, theirs in self.columns.items():
                if theirs not in row.fields:
                    row.fail(theirs, f"data.columns names it for {ours!r}, but it is missing", "correct data.columns")
            names = {ours: row.fields[theirs] for ours, theirs in self.columns.items()}
            yield Row(row.file, row.line, {**row.fields, **names})


def read_rows(path: str | Path, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """Yield every row of a file, a folder or a Hub data set, files in order of their names.

    Raises ConfigError for a missing path, split or subset, or a Hub that cannot be reached; DataError for bad rows.
    """
    if is_local(path):
        for file in data_files(Path(path).expanduser(), split, subset):
            yield from _file_rows(file)
    else:
        yield from _hub_rows(str(path), split, subset)


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 (hex) of names and contents of all data files below `path`; for a Hub id its commit.

    Raises ConfigError where the path is missing, or the Hub cannot be reached and nothing is cached.
    """
    digest = hashlib.sha256()
    if is_local(path):
        root = Path(path).expanduser()
        files = [root] if root.is_file() else _files_below(root)
        if not files:
            raise ConfigError(f"no data file in {str(path)!r}", f"use {', '.join(SUFFIXES)}", field="data.path")
        for file in files:
            digest.update(f"{file.relative_to(root).as_posix()}\0{sha256(file)}\n".encode())
    else:
        digest.update(f"{path}\0{_hub_commit(str(path))}".encode())
    return digest.hexdigest()


def is_local(path: str | Path) -> bool:
    """Return whether the path exists here; False for a possible Hub id. Raise ConfigError for anything else."""
    if Path(path).expanduser().exists():
        return True
    text = str(path)
    if isinstance(path, Path) or not _HUB_ID.fullmatch(text) or text.endswith((*SUFFIXES, ".txt", ".gz")):
        raise ConfigError(f"no file or folder {text!r}", OFFLINE_FIX, field="data.path")
    return False


def data_files(root: Path, split: str = "train", subset: str | None = None) -> list[Path]:
    """Return one split's files: the given file, or those in a folder and its sub-folders named after the split.

    A folder in which a single split exists (only `test.jsonl.gz`, say) gives that one, with a log line.
    """
    if root.is_file():
        if subset is not None:
            raise ConfigError(f"{root.name} is a file: it has no subset {subset!r}", "remove it", field="data.subset")
        return [root]
    if subset is not None and not (root / subset).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no sub-folder"
        raise ConfigError(f"{str(root)!r} has no subset {subset!r}", f"there is: {there}", field="data.subset")
    files = _files_below(root / subset if subset is not None else root)
    if not files:
        raise ConfigError(f"no data file in {str(root)!r}", f"use {', '.join(SUFFIXES)}", field="data.path")
    found = [file for file in files if _split_of(file) == split]
    if found:
        return found
    names = sorted({_split_of(file) for file in files})
    if len(names) > 1:
        raise ConfigError(f"no split {split!r} in {str(root)!r}", f"use one of: {', '.join(names)}", field="data.split")
    log.warning("%s has no split %r: reading its only one, %r", root.name, split, names[0])
    return files


def _files_below(folder: Path) -> list[Path]:
    with explained(folder):
        files = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.name.endswith(SUFFIXES)]
    return sorted(p for p in files if p.is_file() and not p.relative_to(folder).as_posix().startswith("."))


def _split_of(file: Path) -> str:
    """Return a file's split: `train` for train.jsonl.gz and train-00000-of-00003.parquet."""
    return re.sub(r"-\d+-of-\d+$", "", file.name.split(".")[0])


def _file_rows(file: Path) -> Iterator[Row]:
    if file.name.endswith(".parquet"):
        yield from _parquet_rows(file)
    elif file.name.endswith((".json", ".json.gz")) and (values := _json_list(file)) is not None:
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                raise DataError("the row is not an object", "give a list of objects", file=str(file), line=number)
            yield Row(str(file), number, value)
    else:
        for number, fields in read_jsonl(file):
            yield Row(str(file), number, fields)


def _json_list(file: Path) -> list[Any] | None:
    """Return the list that a .json file holds; None where it holds one object per line."""
    with explained(file):
        raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        text = raw.decode("utf-8-sig")
        return json.loads(text) if text.lstrip().startswith("[") else None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"damaged gzip: {error}", "fetch or pack it again", file=str(file)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=str(file)) from None
    except json.JSONDecodeError as error:
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
        raise DataError(problem, "repair the file", file=str(file), line=error.lineno) from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as problem:
        raise ConfigError("Parquet needs pyarrow", "pip install datasets", file=str(file)) from problem
    try:
        with ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
            for number, fields in enumerate(itertools.chain.from_iterable(batches), 1):
                yield Row(str(file), number, fields)
    except (ArrowException, OSError) as problem:
        said = " ".join(str(problem).split())[:150]
        raise DataError(f"not a readable Parquet file: {said}", "fetch it again", file=str(file)) from problem


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
        said = " ".join(str(problem).split())[:150]
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
        said = " ".join(str(problem).split())[:150]
        raise ConfigError(
            f"{name!r} is no local path and the Hub does not answer: {said}", OFFLINE_FIX, field="data.path"
        ) from problem
