"""One run at a time in a folder: a lock file that names its holder and that a crash cannot leave in the way.

Not by filelock: it names no holder, raises where a file system has no locks (ENOLCK, ENOTSUP), and where flock is not
implemented it takes the very file, which here holds the name, for a sign that somebody has the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.faults import point
from macpo.engine.files import explain, read_json
from macpo.engine.removal import is_file, make_way

LOCK = ".lock"
_ENDED = "ended"
_MAX_PID = 2**22  # of Linux on 64 bits, proc_sys_kernel(5); other systems have less


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `started` tells it from a later process with the same number."""

    host: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), start_time(os.getpid()))

    def is_alive(self) -> bool:
        """False only if that process surely ended; one on another host is taken to be alive."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return start_time(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def start_time(pid: int) -> str:
    """When the process started: boot id and clock ticks; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the command before it may hold blanks and brackets
    return _ENDED if fields[0] == "Z" else f"{boot}:{fields[19]}"


def holder(folder: Path) -> Holder | None:
    """The live process that runs in the folder, if there is one."""
    found = _read(folder / LOCK)
    return found if found and found.is_alive() else None


def refuse_held(folder: Path) -> None:
    """Say early what `RunLock` would say; raises its ConfigError where another live process runs in the folder."""
    if (found := holder(folder)) and found != Holder.me():
        raise _taken(folder / LOCK, found)


def _taken(path: Path, found: Holder | None) -> ConfigError:
    return ConfigError(
        f"the run folder is in use by {found or 'another process'}",
        f"wait for it, choose another folder, or delete {path} if that process is gone",
        file=str(path.parent),
    )


class RunLock:
    """Context manager that holds the folder's lock.

    Raises: ConfigError that names the holder if another live process has it. A dead process's lock is cleared.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.path, self.log = folder / LOCK, log
        self.fd = -1

    def __enter__(self) -> Self:
        try:
            self._open()
        except OSError as error:
            raise explain(error, self.path) from error
        found = _read(self.path)
        if found and found.is_alive() and found != Holder.me():
            os.close(self.fd)
            raise _taken(self.path, found)
        if found:
            self.log(f"cleared the lock that {found} left behind")
        elif os.fstat(self.fd).st_size:
            self.log(f"cleared {self.path}, which names no process")
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(asdict(Holder.me())).encode(), 0)
        os.fsync(self.fd)
        point("lock-taken")
        return self

    def _open(self) -> None:
        """The kernel's lock on the file closes the gap between reading its text and replacing it."""
        while True:
            make_way(self.path, self.path.parent, self.log)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    os.close(self.fd)
                    raise _taken(self.path, _read(self.path)) from None
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise  # those are file systems without it, where the text alone has to do
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == os.fstat(self.fd).st_ino:
                    return
            os.close(self.fd)  # its last holder deleted it between our open and our lock

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self.fd)


def _read(path: Path) -> Holder | None:
    """Who the lock names; nobody where it is absent, torn by a crash, or names what cannot be a process."""
    if not is_file(path):
        return None
    try:
        found = Holder(**read_json(path))
    except (MacpoError, TypeError):
        return None
    whole = isinstance(found.host, str) and isinstance(found.started, str) and type(found.pid) is int
    return found if whole and 0 < found.pid <= _MAX_PID else None
