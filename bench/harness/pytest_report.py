"""Runs pytest in processes side by side and writes how it ended, also when it is killed in the middle.

    python -m bench.harness.pytest_report FILE [--shards N] ARGUMENTS...

Every process collects all tests and runs every N-th, in the order of the arguments; no plugin is needed. Each writes
what it knows after a test, and this one merges that into FILE about once a second: numbers by outcome, failures with
the end of their message, reasons of skips, tests that were running, the slowest. Files that cannot be imported count
as errors and do not keep the others from running.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from bench.harness.device import default_device, provenance

MESSAGE, OUTPUT = 1500, 4000  # characters kept of a failure, and shown of a process's output
SLOWEST = 8
OPTIONS = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--maxfail", "8")
SEARCHED = (
    "-o",
    "pythonpath=tests/helpers tests/helpers/operators tests/torture",
)  # the checkout itself is on PYTHONPATH


class Shard:
    """A pytest plugin that keeps every `count`-th test and writes outcomes to a file as they come."""

    def __init__(self, number: int, count: int, path: Path) -> None:
        self.number, self.count, self.path = number, count, path
        self.outcomes: Counter[str] = Counter()
        self.failed: list[dict[str, str]] = []
        self.skipped: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.running, self.ended = "", False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.number :: self.count]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail("error", report.nodeid, report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.skipped:
            self.outcomes["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[reason.removeprefix("Skipped: ")] += 1
        elif report.failed:
            self._fail("failed" if report.when == "call" else "error", report.nodeid, report)
        elif report.when == "call":
            self.outcomes["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        self.running, self.ended = "", True
        self.write()

    def _fail(self, outcome: str, nodeid: str, report: pytest.CollectReport | pytest.TestReport) -> None:
        self.outcomes[outcome] += 1
        self.failed.append({"test": nodeid, "message": report.longreprtext[-MESSAGE:]})

    def write(self) -> None:
        names = ("outcomes", "failed", "skipped", "seconds", "running", "ended")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({name: getattr(self, name) for name in names}), encoding="utf-8")
        temporary.replace(self.path)


def merged(shards: Sequence[dict[str, Any]], num_shards: int) -> dict[str, Any]:
    """Merge what the processes wrote; "tests" is the one line to read."""
    outcomes = sum((Counter(shard["outcomes"]) for shard in shards), Counter[str]())
    skipped = sum((Counter(shard["skipped"]) for shard in shards), Counter[str]())
    seconds = {name: took for shard in shards for name, took in shard["seconds"].items()}
    running = [shard["running"] for shard in shards if shard["running"]]
    ended = sum(shard["ended"] for shard in shards)
    line = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())) or "nothing ran"
    if ended < num_shards:
        line += f"; {num_shards - ended} of {num_shards} processes did not end"
    slowest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:SLOWEST]
    return {
        "tests": line,
        "failed": [failure for shard in shards for failure in shard["failed"]],
        "skipped": dict(skipped),
        "running": running,
        "slowest_s": {name: round(seconds[name], 2) for name in slowest},
    }


def run(path: Path, count: int, arguments: Sequence[str]) -> int:
    """Run the shards to their end, or until an interrupt; return the worst exit status."""
    about = {"bench": "tests", **provenance(default_device())}
    with TemporaryDirectory(prefix="macpo-tests-") as name:
        folder = Path(name)
        outputs = [(folder / f"{k}.log").open("w+") for k in range(count)]
        command = [sys.executable, "-m", "bench.harness.pytest_report", str(folder)]
        processes = [
            subprocess.Popen([*command, "--shard", f"{k}/{count}", *arguments], stdout=output, stderr=subprocess.STDOUT)
            for k, output in enumerate(outputs)
        ]
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(1.0)
                _write(path, about, folder, count)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            body = _write(path, about, folder, count)
            for process, output in zip(processes, outputs, strict=True):
                process.kill()
                output.seek(0)
                if process.wait() not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                    print(output.read()[-OUTPUT:], flush=True)
        print(body["tests"], flush=True)
    codes = [process.returncode for process in processes]
    wrong = [code for code in codes if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)]
    return max(map(abs, wrong), default=0)


def _write(path: Path, about: dict[str, Any], folder: Path, count: int) -> dict[str, Any]:
    shards = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    body = {**about, **merged(shards, count)}
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return body


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="FILE")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--shard", metavar="K/N", help="be process K of N; FILE is then their folder")
    args, arguments = parser.parse_known_args(argv)
    if not args.shard:
        return run(args.path, args.shards, arguments)
    number, count = map(int, args.shard.split("/"))
    plugin = Shard(number, count, args.path / f"{number}.json")
    return int(pytest.main([*OPTIONS, *SEARCHED, *arguments], plugins=[plugin]))


if __name__ == "__main__":
    raise SystemExit(main())
