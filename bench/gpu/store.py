"""The suite's one archive: a folder per part with its log, its result files and how it ended.

    suite.json                 machine, versions, what is missing, what the suite was asked for
    <part>/part.json           status, seconds, limit, digest of the code, whether at small sizes
    <part>/log                 output; the end of it where it is long
    <part>/*.json              results
    <part>.earlier/            what an attempt that did not finish had left; goes when a later one finishes

It is written anew beside the old one and renamed, so that it is whole whenever the suite is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHIVE = "results.tar.gz"
LOG_BYTES, TAIL_LINES = 100_000, 25
DONE, SKIPPED, RUNNING = "done", "skipped", "running"


@dataclass
class Outcome:
    """How a part ended: "done", "skipped", "running" (the suite was killed), or what went wrong."""

    name: str
    status: str
    code: str
    """Digest of the sources that ran."""
    small: bool
    limit: int = 0
    seconds: float = 0.0
    reason: str = ""


class Store:
    """A working folder outside `out`, and its archive in `out`."""

    def __init__(self, out: Path, work: Path, resume: Path | None = None) -> None:
        """Take over `resume`, by default an archive that lies in `out`. Raises OSError, tarfile.TarError."""
        self.work, self.archive = work, out / ARCHIVE
        out.mkdir(parents=True, exist_ok=True)
        source = resume or self.archive
        if resume or self.archive.exists():
            with tarfile.open(source) as archive:
                archive.extractall(work, filter="data")

    def finished(self, name: str, code: str, small: bool) -> bool:
        """Say whether the part has run to its end with this code at these sizes."""
        outcome = self.outcome(name)
        return outcome is not None and (outcome.status, outcome.code, outcome.small) == (DONE, code, small)

    def outcome(self, name: str) -> Outcome | None:
        path = self.work / name / "part.json"
        return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def begin(self, outcome: Outcome) -> Path:
        """Make the part's empty folder; what an earlier attempt left moves aside. Return the folder."""
        folder, earlier = self.work / outcome.name, self.work / f"{outcome.name}.earlier"
        if folder.exists() and list(folder.glob("*.json")) != [folder / "part.json"]:
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.write(outcome)
        return folder

    def write(self, outcome: Outcome) -> None:
        """Write how the part ended, and shorten its log."""
        folder = self.work / outcome.name
        folder.mkdir(exist_ok=True)
        write_json(folder / "part.json", asdict(outcome))
        if outcome.status == DONE:
            shutil.rmtree(self.work / f"{outcome.name}.earlier", ignore_errors=True)
        log = folder / "log"
        if outcome.status != RUNNING and log.exists() and log.stat().st_size > LOG_BYTES:
            log.write_bytes(log.read_bytes()[-LOG_BYTES:])

    def tail(self, name: str) -> list[str]:
        """Return the last lines of a part's output."""
        log = self.work / name / "log"
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []

    def results(self, name: str) -> list[dict[str, Any]]:
        """Return the result files of a part; of an earlier attempt where the last one left none."""
        for folder in (self.work / name, self.work / f"{name}.earlier"):
            files = [path for path in sorted(folder.glob("*.json")) if path.name != "part.json"]
            if found := [body for path in files if (body := _read(path)) is not None]:
                return found
        return []

    def bundle(self) -> None:
        """Write the archive."""
        temporary = self.archive.with_name(f".{ARCHIVE}.tmp")
        with tarfile.open(temporary, "w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                if path.is_file() or (path / "part.json").exists():
                    archive.add(path, path.name, filter=_small)
        os.replace(temporary, self.archive)


def _small(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what is no result: files of a benchmark that is running, and anything large."""
    return info if info.isdir() or (info.isfile() and info.size < 4 * 2**20 and ".tmp" not in info.name) else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # cut off while it was written
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
