"""Opens what others may have put in a file's place: a regular file or nothing, and never waits for it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from macpo.engine.errors import ConfigError

FIX = "put the file there, or remove it"


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading: a FIFO would block for ever, and a device need not end.

    Raises: OSError if it cannot be opened or is a folder; ConfigError for any other kind of file.
    """
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise ConfigError(f"{_kind(mode)} in the place of a regular file", FIX, file=str(path))
    return file


def refuse_special(folder: Path) -> None:
    """Raise ConfigError for a FIFO, socket or device in a folder whose files a library is about to open."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link that leads nowhere is a missing file
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError(f"{_kind(mode)} in the place of a regular file", FIX, file=path)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _kind(mode: int) -> str:
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
