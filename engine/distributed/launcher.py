"""Starts the ranks of one job on this machine (`macpo run --ranks N`), with one message and one exit code for all.

    launch([sys.executable, "-m", "macpo.engine.train", "recipe.yaml"], 8)

torchrun starts the same ranks, also on many nodes, but ends with exit code 1 whatever they report, and kills them 30
seconds after a SIGTERM (`--shutdown-timeout`). Here they have as long as they need to save, and the job exits with 75.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from macpo.engine.console import say
from macpo.engine.distributed.agree import pack_error, unpack_error
from macpo.engine.errors import Again, ConfigError, MacpoError, PeerError, Stopped
from macpo.engine.files import read_json, write_json

ERROR_FILE = "MACPO_ERROR_FILE"
"""Environment variable: the file in which a rank leaves its error for the launcher, which prints it."""
PARENT = "MACPO_LAUNCHER"
"""Environment variable: the launcher's process id; ranks end when it ends."""
_ATTEMPTS = 20
"""Number of attempts for a job that ends with `Again`; each halves a token budget."""


def launch(command: Sequence[str], ranks: int, *, grace_s: float = 30.0) -> None:
    """Run `command` on every rank, with RANK, WORLD_SIZE, MASTER_ADDR and so on as under torchrun, until all end.

    On SIGTERM or Ctrl-C every rank gets one SIGTERM and as much time as it needs to save; a second Ctrl-C kills them.
    When a rank fails, the others notice and end; those that still run after `grace_s` seconds are killed. A job that
    ends with `Again` is restarted.

    Raises:
        MacpoError: the error of the rank that failed first; PeerError if that rank was killed or failed unexpectedly.
        Stopped: the job was stopped on request.
    """
    if ranks < 1:
        raise ConfigError(f"got {ranks}", "start at least one rank", field="--ranks")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with tempfile.TemporaryDirectory(prefix="macpo-ranks-") as folder, _Job(Path(folder), grace_s) as job:
                job.start(command, ranks)
                job.wait()
            return
        except Again as error:
            if attempt == _ATTEMPTS:
                raise
            say(f"note: {error.problems[0].message}; starting the ranks again")


def leave_error(error: BaseException, text: str) -> bool:
    """In a rank: pass the error (`text` if it is no MacpoError) to the launcher.

    Returns:
        True under this launcher, which prints it. torchrun reads the error file of the rank that ended first.
    """
    # an error about a lost peer, or a relayed one, says less than the other rank's own
    second = isinstance(error, PeerError) or (isinstance(error, MacpoError) and error.relayed)
    if ERROR_FILE in os.environ:
        fix = "rerun with --debug and report it"
        known = error if isinstance(error, MacpoError) else PeerError(f"rank {os.environ['RANK']} failed: {text}", fix)
        write_json(Path(os.environ[ERROR_FILE]), {"second": second, **pack_error(known)})
        return True
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if second:
            time.sleep(2.0)  # so that it does not end first
        elif not isinstance(error, Stopped):
            try:
                raise error.with_traceback(None) from None
            except BaseException as short:  # torchrun prints what is being handled, and the message at its end
                get_error_handler().record_exception(short)
    return False


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    error_file: Path

    def error(self) -> tuple[int, MacpoError] | None:
        """(priority, error), the lowest priority being most informative; None if the rank succeeded."""
        code = self.process.returncode
        if code == 0:
            return None
        if self.error_file.exists():
            left = read_json(self.error_file)
            return (2 if left["kind"] == "Stopped" else int(left["second"])), unpack_error(left)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return 0, PeerError(f"rank {self.number} {how}", "look at its last messages and free memory, then run again")


class _Job:
    """Context manager that forwards SIGTERM and SIGINT to the ranks while it is open."""

    def __init__(self, folder: Path, grace_s: float) -> None:
        self.folder, self.grace_s = folder, grace_s
        self.ranks: list[_Rank] = []
        self.ended: list[_Rank] = []
        self.signals = 0
        self.forwarded = False

    def __enter__(self) -> _Job:
        self.old = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signals += 1

    def start(self, command: Sequence[str], ranks: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        for number in range(ranks):
            error_file = self.folder / f"rank-{number}.json"
            own = {
                "RANK": number,
                "LOCAL_RANK": number,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                ERROR_FILE: error_file,
                PARENT: os.getpid(),
            }
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **{k: str(v) for k, v in own.items()}}
            # in its own session, so that Ctrl-C reaches only the launcher, which forwards it once
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            self.ranks.append(_Rank(number, process, error_file))

    def wait(self) -> None:
        """Wait until all ranks have ended. Raises the job's error."""
        deadline = float("inf")
        while len(self.ended) < len(self.ranks):
            for rank in self.ranks:
                if rank not in self.ended and rank.process.poll() is not None:
                    self.ended.append(rank)
            if self.signals and not self.forwarded:
                self.forwarded = True
                for rank in self.ranks:
                    rank.process.terminate()
            failed = any(rank.process.returncode not in (0, Stopped.code) for rank in self.ended)
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + self.grace_s
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        found = [error for rank in self.ended if (error := rank.error()) is not None]
        if found:
            raise min(found, key=lambda error: error[0])[1]
