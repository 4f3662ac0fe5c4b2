"""What a run's folder holds, so that two of them can be compared: bits of results, names of everything else."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

State = dict[str, str]


def is_note(name: str) -> bool:
    """Whether a file holds timings or a log, which stand outside the result."""
    return name.endswith((".log", "timing.json", "timing.jsonl", "attempts.json"))


def state_of(folder: Path) -> State:
    """Relative path of everything below the folder -> SHA-256 of what has to be equal, or what kind of thing it is."""
    found: State = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        relative = path.relative_to(folder).as_posix()
        found[relative] = _digest(path) if stat.S_ISREG(mode) else stat.filemode(mode)[0]
    return found


def _digest(path: Path) -> str:
    if is_note(path.name) or path.name == "report.html":  # times differ from run to run
        return "free"
    raw = path.read_bytes()
    try:
        if path.name == "manifest.json" and "unhashed" in (body := json.loads(raw)):
            raw = json.dumps({key: value for key, value in body.items() if key != "unhashed"}).encode()
        if path.name == "summary.json":
            body = json.loads(raw)
            raw = json.dumps(body | {"stages": [stage["name"] for stage in body["stages"]]}).encode()
    except (ValueError, TypeError, KeyError):
        return "torn " + hashlib.sha256(raw).hexdigest()
    return hashlib.sha256(raw).hexdigest()


def exact(folder: Path) -> str:
    """One hash over names and bytes of everything but the lock: what a resume can see."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path.relative_to(folder)}\0{path.lstat().st_mode}\0".encode())
        if path.is_file() and path.name not in (".lock", "timing.json", "stage.log", "attempts.json"):
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def differences(wanted: State, got: State) -> list[str]:
    """What is lost, what is left over and what has other bits."""
    lines = [f"lost: {name}" for name in wanted.keys() - got.keys()]
    lines += [f"left over: {name}" for name in got.keys() - wanted.keys()]
    lines += [f"other bits: {name}" for name in wanted.keys() & got.keys() if wanted[name] != got[name]]
    return sorted(lines)


def replace(folder: Path, source: Path) -> None:
    """Make `folder` a copy of `source` with its time stamps; absent where that is."""
    remove(folder)
    if source.exists():
        shutil.copytree(source, folder, symlinks=True)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def show(lines: Iterable[str], limit: int = 4) -> str:
    found = list(lines)
    return "; ".join(found[:limit]) + (f"; and {len(found) - limit} more" if len(found) > limit else "")
