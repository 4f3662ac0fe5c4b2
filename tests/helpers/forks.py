"""Run a function in forked processes: real kills and real ranks without paying for imports again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch

from macpo.engine.distributed.world import World, finish, init_from_env
from macpo.engine.errors import MacpoError


def forked(function: Callable[[], object]) -> int:
    """Run it in a child; returns its exit code, an error's own code, or minus the signal that killed it."""
    return wait(start(function))


def start(function: Callable[[], object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    torch.set_num_threads(torch.get_num_threads())  # a new pool: two threads that look for it would race
    try:
        function()
        code = 0
    except MacpoError as error:
        print(error, file=sys.stderr)
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ranks(size: int, function: Callable[[World], object], timeout_s: float = 30.0) -> list[int]:
    """Run it on `size` gloo ranks; returns their exit codes."""
    return [wait(pid) for pid in start_ranks(size, function, timeout_s)]


def start_ranks(size: int, function: Callable[[World], object], timeout_s: float = 30.0) -> list[int]:
    """The same, without waiting: their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def body(rank: int) -> Callable[[], None]:
        def run() -> None:
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
            )
            function(init_from_env(timeout_s))
            finish()

        return run

    return [start(body(rank)) for rank in range(size)]
