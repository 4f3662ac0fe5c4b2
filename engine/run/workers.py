"""Worker processes that run stages side by side: started once, kept (with their module caches), gone with the parent.

The parent and a worker speak JSON lines over pipes; a worker rebuilds the graph from `build`, so nothing is pickled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from macpo.engine.distributed.agree import pack_error
from macpo.engine.errors import MacpoError, is_failure
from macpo.engine.files import explain, is_expected
from macpo.engine.processes import THREAD_VARIABLES, StopFlag, die_with, set_threads, signals_blocked
from macpo.engine.run.executor import Executor
from macpo.engine.run.folder import RunFolder
from macpo.engine.run.stages import Graph

Build = tuple[str, Mapping[str, Any]]  # ("package.module:function", its JSON argument); the function returns a Graph


@dataclass(frozen=True)
class Workers:
    """Stages at once, each in a process of its own with `threads` CPU threads; one runs in this process.

    `build`: what a worker makes the same graph from, where there are several.
    """

    jobs: int = 1
    threads: int | None = None
    build: Build | None = None

    def __post_init__(self) -> None:
        if self.jobs > 1 and self.build is None:
            raise ValueError('jobs > 1 needs build=("module:function", config)')


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    stage: str = ""
    buffer: bytes = b""

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `wait` sees the end of its output and says so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()


class WorkerPool:
    """Up to `jobs` workers, each started when it is first needed."""

    def __init__(self, settings: Workers, run_dir: Path) -> None:
        assert settings.build is not None
        self.build, self.run_dir, self.jobs, self.threads = settings.build, run_dir, settings.jobs, settings.threads
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    @property
    def num_free(self) -> int:
        return self.jobs - sum(bool(worker.stage) for worker in self.workers)

    @property
    def busy(self) -> list[str]:
        return [worker.stage for worker in self.workers if worker.stage]

    def submit(self, stage: str, **request: Any) -> None:
        """Has a free worker run the stage."""
        worker = next((each for each in self.workers if not each.stage), None) or self._start()
        worker.stage = stage
        worker.send({"stage": stage, **request})

    def _start(self) -> _Worker:
        threads = {} if self.threads is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        # Born with both signals blocked: it opens SIGTERM when it can answer it, and Ctrl-C is the parent's to pass on.
        with signals_blocked():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "macpo.engine.run.workers", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **threads, "TERM": "dumb"},  # several live bars cannot share a terminal
            )
        worker = _Worker(process)
        name, config = self.build
        start = {"path": sys.path, "build": name, "config": config, "run_dir": str(self.run_dir)}
        worker.send({**start, "threads": self.threads})
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return worker

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """(stage, answer) of those that ended: "done", "error", "crash" or "died" is the answer's one key."""
        answers = []
        for key, _ in self.selector.select(seconds):
            worker: _Worker = key.data
            data = os.read(key.fd, 1 << 16)
            worker.buffer += data
            *lines, worker.buffer = worker.buffer.split(b"\n")
            for line in lines:
                answers.append((worker.stage, json.loads(line)))
                worker.stage = ""
            if not data:
                self.selector.unregister(key.fileobj)
                self.workers.remove(worker)
                code = worker.process.wait()
                if worker.stage:
                    why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    answers.append((worker.stage, {"died": f"its worker process {worker.process.pid} {why}"}))
        return answers

    def stop_busy(self) -> None:
        """Asks the running stages to stop; their answers still come through `wait`."""
        for worker in self.workers:
            if worker.stage:
                worker.process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.stage:  # only after an abort: its stage is resumed by the next run
                worker.process.kill()
            with contextlib.suppress(BrokenPipeError):
                worker.process.communicate(b"")
        self.selector.close()


def build_graph(build: Build) -> Graph:
    """Calls the function that `build` names."""
    module, _, function = build[0].partition(":")
    return getattr(importlib.import_module(module), function)(build[1])


def main() -> None:
    """A worker: reads how to build the graph, then one stage after another, until its input ends."""
    die_with(int(sys.argv[1]))
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what stages print must not get between the answers
    requests = iter(sys.stdin.buffer)
    start = json.loads(next(requests, b"{}") or b"{}")
    if not start:
        return
    sys.path[:] = start["path"]
    with StopFlag(quiet=True) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        executor: Executor | None = None
        for line in requests:
            request = json.loads(line)
            try:
                if executor is None:
                    graph = build_graph((start["build"], start["config"]))
                    executor = Executor(RunFolder(Path(start["run_dir"])), graph, stop)
                answer = _answer(executor, request, start["threads"])
            except MacpoError as error:
                answer = {"error": pack_error(error)}
            except BaseException as error:
                if not is_failure(error):
                    raise
                if isinstance(error, OSError) and is_expected(error):
                    answer = {"error": pack_error(explain(error))}
                else:  # the parent reports it, with the traceback under --debug
                    answer = {"crash": {"text": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}}
            channel.write(json.dumps(answer).encode() + b"\n")


def _answer(executor: Executor, request: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    name = request["stage"]
    if executor.graph.identity(name) != request["identity"]:
        raise ValueError(f"build() makes another stage {name!r} in a worker: it may depend on its argument only")
    executor.verified |= {(stage, digest) for stage, digest in request["verified"]}
    set_threads(threads)
    result = executor.execute(executor.graph.stage(name), request["digests"])
    return {"done": {**result, "verified": sorted(executor.verified)}}


if __name__ == "__main__":
    main()
