"""The C shim from here: compiled, told what to watch and where to kill, and asked what it saw."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
CONTROL = "TORTURE_CONTROL"
WAYS = ("before", "middle", "after")
_PATH = 4096
_HEAD = struct.Struct("=QQIIIi")  # count, kill_at, when, armed, logs, leader
_BYTES = _HEAD.size + 2 * _PATH


@dataclass(frozen=True, slots=True)
class Kill:
    """A call's number from 1 and one of WAYS: before it, after it, or in the middle of what it writes."""

    call: int
    way: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call that changed a file: its number in the run, its name and the path."""

    number: int
    name: str
    path: str

    @property
    def ways(self) -> tuple[str, ...]:
        """Only what writes bytes has a middle; every other call is one step of the kernel's."""
        return WAYS if self.name in ("write", "pwrite", "writev", "sendfile", "copy_file_range") else WAYS[::2]


class Control:
    """The memory that the shim shares with this process and with every process of a run."""

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)
        self.log = path.with_name("calls.log")

    def arm(self, folder: Path, leader: int, kill: Kill | None = None, *, logs: bool = False) -> None:
        """Count from here the calls below `folder`; kill the process group `leader` at one of them."""
        self.log.unlink(missing_ok=True)
        way = WAYS.index(kill.way) if kill else 0
        for at, path in ((_HEAD.size, folder), (_HEAD.size + _PATH, self.log)):
            raw = os.fsencode(path)
            self._memory[at : at + len(raw) + 1] = raw + b"\0"
        _HEAD.pack_into(self._memory, 0, 0, kill.call if kill else 0, way, 1, int(logs), leader)

    @property
    def armed(self) -> bool:
        return bool(_HEAD.unpack_from(self._memory, 0)[3])

    def disarm(self) -> int:
        """Stop counting; returns the number of calls since `arm`."""
        count, *_ = _HEAD.unpack_from(self._memory, 0)
        _HEAD.pack_into(self._memory, 0, 0, 0, 0, 0, 0, 0)
        return int(count)

    def calls(self) -> list[Call]:
        """What was logged, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [line.split(" ", 2) for line in lines]
        return sorted((Call(int(number), name, path) for number, name, path in found), key=lambda call: call.number)


def build(folder: Path) -> Path:
    """Compile the shim into the folder and return the library."""
    library = folder / "shim.so"
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O2"]
    subprocess.run([*command, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def preloaded() -> tuple[Control, Path]:
    """Start this very process again under the shim, unless it is; returns the control and an empty scratch folder.

    The folder is in memory where the machine offers that, because trials write and sync thousands of small files.
    """
    if CONTROL in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes
        control = Path(os.environ[CONTROL])
        return Control(control), control.parent
    memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(prefix="macpo-torture-", dir=memory if os.access(memory, os.W_OK) else None))
    control = scratch / "control.bin"
    control.write_bytes(bytes(_BYTES))
    environment = {CONTROL: str(control), "LD_PRELOAD": str(build(scratch)), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment)
