"""Where a run's stages lie: `05-name` is finished, `05-name.tmp` in work, `05-name.trash` on its way out.

A finished stage is found by its name whatever its number, so a graph that grew keeps what it has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from macpo.engine.errors import DataError, IntegrityError
from macpo.engine.faults import point
from macpo.engine.files import PART, fsync_dir, read_json, remove_parts, remove_tree
from macpo.engine.run.manifest import TIMING

CACHE = "cache"
"""Sub-folder for what stages and later runs can use again; no part of any result."""
_FOLDER = re.compile(r"\d+-(?P<name>.+?)(?P<state>\.tmp|\.trash)?")


class RunFolder:
    """The names and places of stages inside one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def committed(self, name: str) -> Path | None:
        """The finished stage's folder."""
        return self._find(name, None)

    def partial(self, name: str) -> Path | None:
        """The folder that the stage was writing into when it was last heard of."""
        return self._find(name, ".tmp")

    def finished(self) -> dict[str, Path]:
        """The folders of all finished stages, by name."""
        matches = [(path, _FOLDER.fullmatch(path.name)) for path in sorted(self.path.iterdir())]
        return {match["name"]: path for path, match in matches if match and match["state"] is None}

    def _find(self, name: str, state: str | None) -> Path | None:
        if not self.path.is_dir():
            return None
        matches = [(path, _FOLDER.fullmatch(path.name)) for path in sorted(self.path.iterdir())]
        found = [path for path, match in matches if match and match["name"] == name and match["state"] == state]
        if len(found) > 1:
            raise IntegrityError(
                f"{' and '.join(path.name for path in found)} are the same stage", "delete one", file=str(self.path)
            )
        return found[0] if found else None

    def discard(self, name: str, *, partial: bool = False) -> None:
        """Moves the stage out of the way in one step, then deletes it."""
        path = self.partial(name) if partial else self.committed(name)
        if path is None:
            return
        trash = path.with_name(path.name.removesuffix(".tmp") + ".trash")
        remove_tree(trash, self.path)
        path.rename(trash)
        fsync_dir(self.path)
        point("stage-discarded")
        remove_tree(trash, self.path)

    def sweep(self) -> None:
        """Deletes what a kill left half deleted or half written at the top of the folder and in its cache."""
        for path in list(self.path.iterdir()):
            match = _FOLDER.fullmatch(path.name)
            if (match and match["state"] == ".trash") or (path.name.startswith(".") and path.name.endswith(PART)):
                remove_tree(path, self.path)
        remove_parts(self.path / CACHE)


def folder_of(run_dir: Path, name: str) -> Path:
    """The folder of a finished stage. Raises: DataError where the run has not finished that stage."""
    found = RunFolder(run_dir).committed(name)
    if found is None:
        raise DataError(f"stage {name} is not finished", "run the recipe to its end first", file=str(run_dir))
    return found


def read_timing(folder: Path) -> dict[str, Any]:
    """What the stage took and noted; empty where it was never written or is torn (it stands outside the result)."""
    if not (folder / TIMING).is_file():
        return {}
    try:
        found = read_json(folder / TIMING)
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}
