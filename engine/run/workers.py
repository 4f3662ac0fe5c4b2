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
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from macpo.engine.console import LIVE_SECONDS, quiet_output
from macpo.engine.distributed.agree import pack_error
from macpo.engine.errors import MacpoError, is_failure
from macpo.engine.files import explain, is_expected
from macpo.engine.processes import THREAD_VARIABLES, StopFlag, die_with, set_threads, signals_blocked
from macpo.engine.progress import Report, shown_by
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
    printed: bytes = b""
    """The beginning of a line."""

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `wait` sees the end of its output and says so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """It ends once it has nothing to do."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """Give back what is left of a process that has ended."""
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class WorkerPool:
    """Up to `jobs` workers, each started when it is first needed.

    `said`: gets every line that a worker prints, and the stage that it runs.
    """

    def __init__(self, settings: Workers, run_dir: Path, said: Callable[[str, str], None]) -> None:
        assert settings.build is not None
        self.build, self.run_dir, self.jobs, self.threads = settings.build, run_dir, settings.jobs, settings.threads
        self.said = said
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    @property
    def num_free(self) -> int:
        return self.jobs - sum(bool(worker.stage) for worker in self.workers)

    @property
    def busy(self) -> list[str]:
        return [worker.stage for worker in self.workers if worker.stage]

    def submit(self, stage: str, **request: Any) -> int:
        """Has a free worker run the stage; returns that process's id."""
        worker = next((each for each in self.workers if not each.stage), None) or self._start()
        worker.stage = stage
        worker.send({"stage": stage, **request})
        return worker.process.pid

    def _start(self) -> _Worker:
        threads = {} if self.threads is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        # Born with both signals blocked: it opens SIGTERM when it can answer it, and Ctrl-C is the parent's to pass on.
        with signals_blocked():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "macpo.engine.run.workers", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,  # what several print goes to the terminal line by line, and above the display
                env={**os.environ, **threads},
            )
        worker = _Worker(process)
        name, config = self.build
        start = {"path": sys.path, "build": name, "config": config, "run_dir": str(self.run_dir)}
        worker.send({**start, "threads": self.threads})
        self.workers.append(worker)
        for stream in (process.stdout, process.stderr):
            self.selector.register(stream, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return worker

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """(stage, answer) of those that say something: "progress", or at the end "done", "error", "crash" or "died",
        is the answer's one key."""
        answers = []
        events = self.selector.select(seconds)
        for key, _ in sorted(events, key=lambda event: event[0].fileobj is event[0].data.process.stdout):
            worker: _Worker = key.data
            data = os.read(key.fd, 1 << 16)
            if key.fileobj is worker.process.stderr:
                self._hear(worker, data)
                if not data:
                    self.selector.unregister(key.fileobj)
                continue
            worker.buffer += data
            *lines, worker.buffer = worker.buffer.split(b"\n")
            for line in lines:
                answer = json.loads(line)
                answers.append((worker.stage, answer))
                worker.stage = worker.stage if "progress" in answer else ""
            if not data:
                self.selector.unregister(key.fileobj)
                code = worker.process.wait()
                self._hear_out(worker)
                self.workers.remove(worker)
                worker.close()
                if worker.stage:
                    why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    answers.append((worker.stage, {"died": f"its worker process {worker.process.pid} {why}"}))
        return answers

    def _hear(self, worker: _Worker, data: bytes) -> None:
        """Pass on what a worker prints, whole lines of it, the last one also where it is not whole."""
        *lines, worker.printed = (worker.printed + data).split(b"\n")
        if not data and worker.printed:
            lines, worker.printed = [*lines, worker.printed], b""
        for line in lines:
            self.said(worker.stage, line.decode(errors="replace").rstrip("\r"))

    def _hear_out(self, worker: _Worker) -> None:
        """The last words of a worker that ends."""
        stream = worker.process.stderr
        assert stream is not None
        if stream in self.selector.get_map():
            self.selector.unregister(stream)
            os.set_blocking(stream.fileno(), False)  # a process that it started may hold the other end
            with contextlib.suppress(BlockingIOError):
                while data := os.read(stream.fileno(), 1 << 16):
                    self._hear(worker, data)
        self._hear(worker, b"")

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
            worker.end()
        while self.workers:
            self.wait(0.2)
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
    with StopFlag(quiet=True) as stop, shown_by(_Channel(channel)), quiet_output():
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


class _Channel:
    """Sends the parent what the running stage reports, as often as a terminal shows it."""

    def __init__(self, channel: IO[bytes]) -> None:
        self._channel, self._sent = channel, float("-inf")
        self._before: Report | None = None

    def report(self, report: Report) -> None:
        now, before, self._before = time.monotonic(), self._before, report
        same = before is not None and (before.unit, before.total) == (report.unit, report.total)
        if same and report.done < report.total and now - self._sent < LIVE_SECONDS:
            return
        self._sent = now
        self._channel.write(json.dumps({"progress": asdict(report)}).encode() + b"\n")

    def close(self) -> None:
        """The stage's end is said by its answer."""


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
