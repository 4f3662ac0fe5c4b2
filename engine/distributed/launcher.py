"""Starts the ranks of one job on this machine (`macpo run --ranks N`), with one message and one exit code for all.

    launch([sys.executable, "-m", "macpo.engine.train", "recipe.yaml"], 8)

torchrun starts the same ranks, also on many nodes, but ends with exit code 1 whatever they report, and kills them 30
seconds after a SIGTERM (`--shutdown-timeout`). Here they have as long as they need to save, and the job exits with 75.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from macpo.engine.console import say
from macpo.engine.distributed.agree import pack_error, stopped, unpack_error
from macpo.engine.errors import Again, ConfigError, MacpoError, PeerError, Stopped
from macpo.engine.processes import heeded, interrupt, signals_blocked

ERROR_FD = "MACPO_ERROR_FD"
"""Environment variable: number of the open file in which a rank leaves its error for the launcher, which prints it. The
file has no name, so that nothing of it is left when the launcher is killed."""
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
            with _Job(grace_s) as job:
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
    if ERROR_FD in os.environ:
        fix = "rerun with --debug and report it"
        known = error if isinstance(error, MacpoError) else PeerError(f"rank {os.environ['RANK']} failed: {text}", fix)
        with open(int(os.environ[ERROR_FD]), "wb") as file:
            file.write(json.dumps({"second": second, **pack_error(known)}).encode())
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
    left: IO[bytes]
    """Where it leaves its error."""

    def error(self, asked: bool) -> tuple[int, MacpoError] | None:
        """(priority, error), the lowest priority being most informative; None if the rank succeeded.

        `asked`: whether the ranks were asked to stop; one that lost a peer has then lost it because that one stopped.
        """
        code = self.process.returncode
        if code == 0:
            return None
        self.left.seek(0)
        try:
            found = json.loads(self.left.read())
            error = unpack_error(found)
        except (ValueError, KeyError, TypeError):  # it was killed before it had written it
            if asked and code == -signal.SIGTERM:
                return 1, stopped("the start")
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return 0, PeerError(
                f"rank {self.number} {how}", "look at its last messages and free memory, then run again"
            )
        if isinstance(error, Stopped):
            return (1 if asked else 2), error
        return (2 if asked else 1) if found["second"] else 0, error


class _Job:
    """Context manager that forwards SIGTERM and SIGINT to the ranks while it is open."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.ranks: list[_Rank] = []
        self.ended: list[_Rank] = []
        self.signals = 0
        self.forwarded = False

    def __enter__(self) -> _Job:
        self.old = {number: signal.signal(number, self._catch) for number in heeded()}
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()
            rank.left.close()
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signals and number == signal.SIGINT:
            interrupt()
        self.signals += 1

    def start(self, command: Sequence[str], ranks: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        for number in range(ranks):
            left = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the job
            own = {
                "RANK": number,
                "LOCAL_RANK": number,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                ERROR_FD: left.fileno(),
                PARENT: os.getpid(),
            }
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **{k: str(v) for k, v in own.items()}}
            with signals_blocked():  # a rank that still imports torch answers SIGTERM later instead of dying of it
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[left.fileno()],
                    start_new_session=True,  # so that Ctrl-C reaches only the launcher, which forwards it once
                )
                self.ranks.append(_Rank(number, process, left))

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
        found = [error for rank in self.ended if (error := rank.error(self.forwarded)) is not None]
        if found:
            raise min(found, key=lambda error: error[0])[1]
