"""Three small finished runs, `macpo`, `preference` and `sft`; test_finished_runs.py describes them."""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "data" / "finished-runs.tar.xz"


def unpack_runs(folder: Path) -> Path:
    """The runs' folders, at `runs/KIND` below a folder, as their recipes say; returns `runs`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder / "runs", filter="data")
    return folder / "runs"
