"""Where a run's stages lie: `05-name` is finished, `05-name.tmp` in work; what ends in `.trash` is being deleted.

A finished stage is found by its name whatever its number, so a graph that grew keeps what it has.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from macpo.engine.errors import DataError, IntegrityError, MacpoError
from macpo.engine.files import PART, fsync_dir, read_json
from macpo.engine.removal import TRASH, is_folder, make_way, remove, remove_leftovers
from macpo.engine.run.manifest import STAGE_LOG, STEP_TIMES, TIMING

log = logging.getLogger(__name__)

CACHE = "cache"
"""Sub-folder for what stages and later runs can use again; no part of any result."""
SHARED = (CACHE, "trackers")
"""Sub-folders that belong to no stage."""
_FILES = (".lock", "RERUN.json", "recipe.yaml", "summary.json", "report.html", "attempts.json")
_TRASH_OF_FILES = {name + TRASH for name in _FILES}
_MOST = 1e300  # a number above it, or NaN, was not counted or measured
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
        ending = f"-{name}{state or ''}"  # a quick look at each name, as a run may have thousands of stages
        likely = sorted(each for each in os.listdir(self.path) if each.endswith(ending))
        matches = [(self.path / each, _FOLDER.fullmatch(each)) for each in likely]
        found = [path for path, match in matches if match and match["name"] == name and match["state"] == state]
        if len(found) > 1:
            raise IntegrityError(
                f"{' and '.join(path.name for path in found)} are the same stage", "delete one", file=str(self.path)
            )
        return found[0] if found else None

    def discard(self, name: str, *, partial: bool = False) -> None:
        """Delete the stage's folder; after a kill it is there whole or not at all."""
        path = self.partial(name) if partial else self.committed(name)
        if path is not None:
            remove(path, self.path)
            fsync_dir(self.path)

    def sweep(self, log: Callable[[str], None]) -> None:
        """Delete what a kill left half deleted or half written beside the stages and in what they share.

        Also, with a line, what lies in the place of a finished stage's timings and log and is no file.
        """
        for path in list(self.path.iterdir()):
            half_written = path.name.startswith(".") and path.name.endswith(PART)
            match = _FOLDER.fullmatch(path.name)
            if half_written or (match and match["state"]) == TRASH or path.name in _TRASH_OF_FILES:
                remove(path, self.path)
            elif match and match["state"] is None and is_folder(path):
                for name in (TIMING, STEP_TIMES, STAGE_LOG):
                    make_way(path / name, path, log)
        for shared in SHARED:
            remove_leftovers(self.path / shared)


def folder_of(run_dir: Path, name: str) -> Path:
    """The folder of a finished stage. Raises: DataError where the run has not finished that stage."""
    found = RunFolder(run_dir).committed(name)
    if found is None:
        raise DataError(f"stage {name} is not finished", "run the recipe to its end first", file=str(run_dir))
    return found


def read_timing(folder: Path) -> dict[str, Any]:
    """What the stage took and noted, `seconds` and `counts`, without what is no finite number; empty if it is absent.

    The file stands outside the result, so one that is torn or of another shape is ignored, with one line.
    """
    path = folder / TIMING
    if not os.path.lexists(path):
        return {}
    try:
        found = read_json(path)
    except MacpoError as error:
        _say_ignored(path, error.problems[0].message)
        return {}
    counts = found.get("counts") if isinstance(found, dict) else None
    if not isinstance(counts, dict):
        _say_ignored(path, "not an object with counts")
        return {}
    kept = {name: value for name, value in counts.items() if _is_number(value)}
    seconds = found.get("seconds")
    return {"counts": kept} | ({"seconds": seconds} if _is_number(seconds) and seconds >= 0 else {})


@functools.cache
def _say_ignored(path: Path, why: str) -> None:
    log.warning("%s is ignored: %s", path, why)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
