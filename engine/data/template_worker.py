"""A process of its own for chat templates that cannot be counted, with limits of memory, CPU and wall-clock time.

    reply = ask({"source": source, "values": values, "max_chars": 1_000_000})

There is one in a process that needs it, started at the first request and again after every failure. It reads a JSON
line and writes one, ends with its parent (a signal of the kernel, and the end of the pipe), and shares no terminal and
no process group with it, so that signals to these leave it to its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from macpo.engine.errors import ConfigError, ResourceError, one_line
from macpo.engine.processes import die_with

SECONDS = 10
"""Limit of CPU and of wall-clock time for one rendering."""
MEMORY_BYTES = 1 << 30
"""Limit of the worker's address space."""
_START_SECONDS = 120.0
_FIX = "set template to vicuna, alpaca, chatml, plain or a jinja file that does less"


class _Worker:
    """The process, and what this one knows of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def forked(self) -> None:
        """In a fork of this process: the worker belongs to the parent."""
        if self.process is not None:
            self.process.returncode = 0  # so that nothing here waits for another's child
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    os.close(pipe.detach().fileno())  # type: ignore[union-attr]
        self.__init__()  # type: ignore[misc]

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is not None:
            self.end()
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "macpo.engine.data.template_worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,
            )
            os.set_blocking(self.process.stdin.fileno(), False)  # type: ignore[union-attr]
            if _exchange(self.process, b"\n", _START_SECONDS) != b"{}":
                self.end()
                raise ResourceError("the process that renders chat templates does not start", "start it again")
        return self.process


_WORKER = _Worker()
atexit.register(_WORKER.end)
os.register_at_fork(after_in_child=_WORKER.forked)


def ask(request: dict[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
    """The worker's reply to a request (`_response`).

    Raises:
        ConfigError: the template reached a limit. ResourceError: no worker starts.
    """
    payload = json.dumps(request, default=str).encode() + b"\n"
    with _WORKER.lock:
        process = _WORKER.running()
        try:
            line = _exchange(process, payload, seconds)
            reply = json.loads(line) if line else {}
            if reply and "memory" not in reply:
                return dict(reply)
        except BaseException:  # also Ctrl-C: the reply to come belongs to no other request
            _WORKER.end()
            raise
        if line is None:
            _WORKER.end()
            why = f"does not end within {seconds:g} s"
        else:
            code = 0 if reply else process.wait()
            why = f"needs more than {MEMORY_BYTES >> 20:,} MiB of memory" if reply else _death(code, seconds)
            _WORKER.end()
    raise ConfigError(f"the chat template {why}", _FIX, field="template")


def _death(code: int, seconds: float) -> str:
    if code == -signal.SIGXCPU:
        return f"does not end within {seconds:g} s"
    return f"ends the process that renders it (exit code {code})"


def _exchange(process: subprocess.Popen[bytes], payload: bytes, seconds: float) -> bytes | None:
    """The line that the worker writes for a payload, b"" if it ends instead, None if it takes too long."""
    assert process.stdin is not None and process.stdout is not None
    to, back, deadline = process.stdin.fileno(), process.stdout.fileno(), time.monotonic() + seconds
    left, got = memoryview(payload), bytearray()
    while not got.endswith(b"\n"):
        wait = deadline - time.monotonic()
        ready = select.select([back], [to] if left else [], [], max(wait, 0))
        if wait <= 0 and not any(ready):
            return None
        if ready[1]:
            try:
                left = left[os.write(to, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return b""
        if ready[0]:
            part = os.read(back, 1 << 20)
            if not part:
                return b""
            got += part
    return bytes(got[:-1])


# --- the worker itself ---------------------------------------------------------------------------------------------


def main() -> None:
    die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _limit("RLIMIT_AS", MEMORY_BYTES)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        _limit("RLIMIT_CPU", int(time.process_time()) + SECONDS + 1)
        try:
            reply: dict[str, Any] = _response(json.loads(line)) if line.strip() else {}
        except MemoryError:
            reply = {"memory": True}
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()
        if "memory" in reply:
            return


def _limit(name: str, value: int) -> None:
    """Set a soft limit of this process where the system has it."""
    import resource

    kind = getattr(resource, name, None)
    if kind is not None:
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _response(request: dict[str, Any]) -> dict[str, Any]:
    """The "text" of a rendering, or what it "wrote" if that is too long; the "names" a template reads; an "error"."""
    try:
        if "names" in request:
            return {"names": sorted(names_of(_environment().parse(request["names"])))}
        text = _compiled(request["source"]).render(request["values"])
    except MemoryError:
        raise
    except Exception as problem:  # templates raise whatever they like
        return {"error": one_line(problem, 2000)}
    return {"text": text} if len(text) <= request["max_chars"] else {"wrote": len(text)}


def names_of(tree: Any) -> set[str]:
    """The names that a template reads and does not define. It folds constants, so the tree has to be trusted."""
    from jinja2 import meta

    return meta.find_undeclared_variables(tree)


@functools.cache
def _environment() -> Any:
    from macpo.engine.data.jinja_environment import environment

    return environment()


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


if __name__ == "__main__":
    main()
