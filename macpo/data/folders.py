"""Which files of a folder hold a split, in the layouts that people publish.

    train.jsonl  train-00000-of-00002-1f2e3d4c.parquet  train_0.jsonl  harmless-base/train.jsonl.gz
    train/part-0.parquet  default/train/0000.parquet  a folder of `save_to_disk`

A file's split is its name without the number of a shard; where the name is but a number, or stands for no split while
the folder's does, it is the folder's name. A split that was not asked for is never read.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from macpo.engine.errors import ConfigError
from macpo.engine.files import explained, read_json

log = logging.getLogger("macpo.data")

FIRST_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SUFFIXES = (*FIRST_SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz")
SPLIT_WORDS = {"train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"}
MAX_DEPTH = 4
SAVED_STATE = "state.json"
"""Marks a folder that `Dataset.save_to_disk` wrote; it is read as one file."""
_NO_ROWS = {SAVED_STATE, "dataset_dict.json", "dataset_info.json", "dataset_infos.json"}
_SHARD = re.compile(r"[-_](?:\d+-of-\d+(?:-[0-9a-f]{6,})?|\d+)$")
_NUMBER = re.compile(r"(?:part|shard|chunk|data|file)?[-_]?\d+(?:-of-\d+)?(?:-[0-9a-f-]{6,}(?:-c\d+)?)?")


def data_files(root: Path, split: str = "train", subset: str | None = None) -> list[Path]:
    """Return one split's files, or folders of `save_to_disk`: the given file, or those below a folder.

    A folder whose only split bears no split's name (`mine.jsonl`, say) gives that one, with a log line.
    Raises ConfigError, naming what is there, for a subset or split that is not, and for a file in two forms.
    """
    if not root.is_dir():
        _check_file(root, split, subset)
        return [root]
    if subset is not None and not (root / subset).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no sub-folder"
        raise ConfigError(f"{str(root)!r} has no subset {subset!r}", f"there is: {there}", field="data.subset")
    top = root / subset if subset is not None else root
    if (top / SAVED_STATE).is_file():
        saved = read_json(top / SAVED_STATE)
        name = saved.get("_split") if isinstance(saved, dict) else None
        return _only_split(top, [str(name or top.name)], split, [top]) if name != split else [top]
    splits = {file: split_of(file.relative_to(top)) for file in _readable(top)}
    if not splits:
        there = ", ".join(sorted(p.name for p in top.iterdir())[:8]) or "nothing"
        problem = f"no data file in {str(top)!r}, which holds {there}"
        raise ConfigError(problem, f"use {', '.join(SUFFIXES)}", field="data.path")
    found = [file for file, name in splits.items() if name == split]
    found = found or [file for file in splits if file.name.split(".")[0] == split]
    if not found:
        found = _only_split(root, sorted(set(splits.values())), split, list(splits))
    _check_forms(found)
    return found


def has_split(root: Path, split: str, subset: str | None = None) -> bool:
    """Return whether `data_files` finds a split."""
    try:
        return bool(data_files(root, split, subset))
    except ConfigError:
        return False


def files_of(root: Path) -> list[Path]:
    """Return all files that a folder's rows may come from, sorted, those of every earlier version first."""
    with explained(root):
        first = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.name.endswith(FIRST_SUFFIXES)]
    first = sorted(p for p in first if p.is_file() and not p.relative_to(root).as_posix().startswith("."))
    later = []
    for path in _readable(root):
        later += sorted(path.iterdir()) if path.is_dir() else [path]
    if (root / SAVED_STATE).is_file():
        later = sorted(path for path in root.iterdir() if path.is_file())
    return [*first, *(path for path in later if path not in set(first))]


def split_of(file: Path) -> str:
    """Return the split that a file's path, relative to the data's folder, stands for."""
    stem = file.name.split(".")[0]
    plain = _SHARD.sub("", stem) or stem
    folders = list(reversed(file.parts[:-1]))
    if plain in SPLIT_WORDS:
        return plain
    named = next((folder for folder in folders if folder in SPLIT_WORDS), None)
    if named is None and folders and _NUMBER.fullmatch(stem):
        named = folders[0]
    return named or plain


def _readable(top: Path) -> list[Path]:
    """Return the data files and folders of `save_to_disk` below a folder, sorted; hidden ones are left out."""
    found: list[Path] = []
    with explained(top):
        for base, folders, names in os.walk(top):
            here = Path(base)
            if here != top and SAVED_STATE in names:
                found.append(here)
                folders.clear()
                continue
            deep = len(here.relative_to(top).parts) >= MAX_DEPTH - 1
            folders[:] = [] if deep else [folder for folder in folders if not folder.startswith(".")]
            found += [here / name for name in names if name.endswith(SUFFIXES) and name not in _NO_ROWS]
    return sorted(path for path in found if not path.name.startswith("."))


def _check_file(file: Path, split: str, subset: str | None) -> None:
    if subset is not None:
        raise ConfigError(f"{file.name} is a file: it has no subset {subset!r}", "remove it", field="data.subset")
    named = split == "train" or split in (split_of(Path(file.name)), file.name.split(".")[0])
    if not named and not file.name.endswith((".json", ".json.gz")):  # JSON may hold several splits under their names
        problem = f"{file.name} is a file: it has no split {split!r}"
        raise ConfigError(problem, "remove it, or give the folder of the splits", field="data.split")
    if "." in file.name and not file.name.endswith(SUFFIXES):
        fix = f"give the data as {', '.join(SUFFIXES)}, as a folder of them, or as a folder of save_to_disk"
        raise ConfigError(f"cannot read files like {file.name!r}", fix, field="data.path")


def _only_split(root: Path, names: list[str], split: str, files: list[Path]) -> list[Path]:
    """Return the files of the only split there is, unless it bears the name of another than was asked for."""
    words = set(re.split(r"[-_]", names[0]))
    if len(names) > 1 or (words & SPLIT_WORDS and split not in words):
        fix = f"use {'one of: ' if len(names) > 1 else ''}{', '.join(names)}"
        raise ConfigError(f"no split {split!r} in {str(root)!r}", fix, field="data.split")
    log.warning("%s has no split %r: reading its only one, %r", root.name, split, names[0])
    return files


def _check_forms(files: list[Path]) -> None:
    """Raise where a file is there in two forms, as train.jsonl beside train.jsonl.gz: its rows would be doubled."""
    seen: dict[Path, Path] = {}
    for file in files:
        bare = file.with_name(next((file.name[: -len(s)] for s in _LONGEST if file.name.endswith(s)), file.name))
        other = seen.setdefault(bare, file)
        if other is not file:
            problem = f"{other.name} and {file.name} in {str(file.parent)!r} are the same split in two forms"
            raise ConfigError(problem, "remove one of them, or name the other in data.path", field="data.path")


_LONGEST = sorted(SUFFIXES, key=len, reverse=True)
