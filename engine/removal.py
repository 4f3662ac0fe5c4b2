"""Deletes that a kill cannot leave half done: a folder is renamed to `NAME.trash` first, then emptied.

Whatever bears that ending counts as deleted, so a start or a resume deletes it (`remove_leftovers`). A link is deleted,
never followed.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from macpo.engine.errors import IntegrityError
from macpo.engine.faults import point
from macpo.engine.files import PART, explained

TRASH = ".trash"
"""Ending of a folder that is being deleted."""


def remove(path: Path, inside: Path) -> None:
    """Delete a file, a link, or a folder with all that it holds, below the folder `inside`; what is absent stays so.

    Raises:
        IntegrityError: `path` does not lie below `inside`, also where a link in its way leads out of it.
        ConfigError: the file system refuses.
    """
    if not _lies_below(path, inside):
        raise IntegrityError(f"refuses to delete outside {inside}", "delete it by hand", file=path)
    with explained(path):
        if not is_folder(path):
            path.unlink(missing_ok=True)
            return
        aside = path
        if not path.name.endswith(TRASH):
            aside = path.with_name(path.name + TRASH)
            remove(aside, inside)  # what an earlier delete of the same name left
            os.rename(path, aside)
            point("set-aside")
        shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill left anywhere below the folder: files that were being written, folders being deleted."""
    if not is_folder(folder):
        return
    for base, folders, names in os.walk(folder):
        for name in [each for each in folders if each.endswith(TRASH)]:
            remove(Path(base) / name, folder)
            folders.remove(name)
        for name in names:
            if name.startswith(".") and name.endswith(PART):
                (Path(base) / name).unlink(missing_ok=True)


def make_way(path: Path, inside: Path, log: Callable[[str], None]) -> None:
    """Delete what lies in the place of a file of ours and is none, a folder, a link or a FIFO, and say so."""
    if os.path.lexists(path) and not is_file(path):
        remove(path, inside)
        log(f"removed {path}, which is not a file that a run has written")


def is_folder(path: Path) -> bool:
    """Whether a folder lies there, and not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether a regular file lies there, and not a link to one, a FIFO or a device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _lies_below(path: Path, inside: Path) -> bool:
    top = inside.resolve()
    where = path.parent.resolve()
    return where.is_relative_to(top) and where / path.name != top and path.name not in ("", "..")
