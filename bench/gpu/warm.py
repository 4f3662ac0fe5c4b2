"""Starts the parts of a dry run without importing torch for each: they are forked from one process that has it.

    python -m bench.gpu.warm serve SOCKET        imports, then forks a process for every part that asks
    python -m bench.gpu.warm SOCKET ARGUMENTS    runs what `python ARGUMENTS` would, in such a fork; its exit status

A fork has the output of the process that asked, and ends with it. Only a CPU's parts can start like this: CUDA does not
outlive a fork, and a GPU's parts are to be measured as they are run.
"""

from __future__ import annotations

import contextlib
import os
import resource
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path

WAIT_S = 120.0
MESSAGE = 1 << 16


def serve(path: str) -> None:
    """Import what most parts import, then fork for every connection."""
    from torch import _dynamo  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from bench.harness import options  # noqa: F401
    from bench.peers import trainers  # noqa: F401
    from macpo.engine.generation import Generator  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that answer a connection
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.tmp")
        server.listen()
        Path(f"{path}.tmp").rename(path)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run the part in a process group of its own; send its exit status, or kill it when the other side ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, outputs, _, _ = socket.recv_fds(connection, MESSAGE, 2)
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, number)
        work(message.decode().split("\0"))
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.05)[0]:  # nothing more is sent: the other side is gone
            os.killpg(child, signal.SIGKILL)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(outputs[0], f"[{usage.ru_utime + usage.ru_stime:.1f} s of CPU time]\n".encode())
    connection.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())
    os._exit(0)


def work(arguments: list[str]) -> None:
    """Do what `python -m MODULE ARGUMENTS` does, and exit."""
    flag, module, *rest = arguments
    code = 1
    try:
        if flag != "-m":
            raise ValueError(f"only `-m MODULE` starts warm, not {flag}")
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ask(path: str, arguments: list[str]) -> int:
    """Have the server run the arguments; return their exit status."""
    end = time.monotonic() + WAIT_S
    while not Path(path).exists():
        if time.monotonic() > end:
            raise SystemExit(f"error: no server at {path}")
        time.sleep(0.05)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, ["\0".join(arguments).encode()], [1, 2])
        return int(connection.recv(16) or 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    raise SystemExit(ask(sys.argv[1], sys.argv[2:]))
