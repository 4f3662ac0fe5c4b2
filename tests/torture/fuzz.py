"""Feed every loader broken files from a seed: anything but the project's own errors, quickly and in little memory.

    python tests/torture/fuzz.py --minutes 10 --seed 0 --loaders recipe,lock --keep

A finding is another exception than engine/errors.py has, an error of more than a short printable line, more than 5 s of
processor time, 20 s of standing still, or more than 512 MB. Its input is kept under tests/torture/corpus/LOADER with
`--keep`, and every test run replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import mmap
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loaders import LOADERS, Loader

from macpo.engine.errors import MacpoError
from macpo.engine.files import is_expected

CORPUS = Path(__file__).with_name("corpus")
MAX_CPU_S, MAX_STILL_S, MAX_GROWTH_BYTES, MAX_LINE = 5.0, 20.0, 512 * 2**20, 2000
_BATCH = 3000  # inputs before a worker is replaced by a fresh one


@dataclass
class Count:
    """What a loader was fed: the number of each kind of finding, and its first cases."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    cases: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, case: int) -> None:
        self.findings[kind] += 1
        self.cases.setdefault(kind, []).append(case)


def judge(loader: Loader, folder: Path, file: str) -> str:
    """Call the loader: "" where it took the files, "refused" where it refused them properly, else the finding."""
    try:
        loader.load(folder, file)
    except MacpoError as error:
        lines = [str(problem) for problem in error.problems]
        ugly = [line for line in lines if len(line) > MAX_LINE or not line.isprintable()]
        return f"an error that is no short printable line: {type(error).__name__}" if ugly else "refused"
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, OSError) and is_expected(error):
            return "refused"
        last = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in last if "/macpo/" in frame.filename or "/engine/" in frame.filename]
        place = ours[-1] if ours else last[-1]
        return f"{type(error).__name__} in {Path(place.filename).name}, {place.name}"
    return ""


class Bench:
    """One loader's good files in a folder of memory, one of them replaced at a time.

    `kept`: name and content of the one broken file that takes the place of all cases.
    """

    def __init__(self, loader: Loader, scratch: Path, seed: int, kept: tuple[str, bytes] | None = None) -> None:
        self.loader, self.seed, self.kept = loader, seed, kept
        self.folder = scratch / loader.name
        self.folder.mkdir()
        loader.make(self.folder)
        self.good = {name: (self.folder / name).read_bytes() for name in loader.mutates}
        for name in self.good:
            said = judge(loader, self.folder, name)
            assert not said, f"{loader.name}: the good {name} gives {said!r}"

    def case(self, number: int) -> tuple[str, bytes]:
        if self.kept is not None:
            return self.kept
        return self.loader.broken(self.good, random.Random(f"{self.seed}:{self.loader.name}:{number}"))

    def feed(self, name: str, raw: bytes) -> str:
        """Judge the loader on one broken file; afterwards the good one lies there again."""
        path = self.folder / name
        path.write_bytes(raw)
        try:
            return judge(self.loader, self.folder, name)
        finally:
            if not path.is_file():  # checkpoints that do not verify may be removed
                shutil.rmtree(self.folder)
                self.folder.mkdir()
                self.loader.make(self.folder)
            path.write_bytes(self.good[name])


def fuzz(bench: Bench, first: int, count: int, deadline: float) -> tuple[Count, int]:
    """Feed the cases from number `first` in forked workers; returns what they showed and the next number."""
    total, number, end = Count(), first, first + count
    while number < end and time.monotonic() < deadline:
        number = _batch(bench, number, min(end, number + _BATCH), deadline, total)
    return total, number


def _batch(bench: Bench, first: int, end: int, deadline: float, total: Count) -> int:
    """One worker: case and number of refusals are in shared memory, findings in a pipe; returns the next case."""
    shared = mmap.mmap(-1, 16)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work(bench, range(first, end), deadline, shared, writer)
    os.close(writer)
    began = time.monotonic()
    text = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    case, cpu, still, killed = -1, 0.0, began, ""
    while True:
        if poll.poll(200):
            chunk = os.read(reader, 65536)
            text += chunk
            if not chunk:
                break
        now, used = int.from_bytes(shared[:8], "little"), _cpu_seconds(pid)
        if now != case:
            case, cpu, still = now, used, time.monotonic()
        elif used - cpu > MAX_CPU_S:
            killed = f"more than {MAX_CPU_S:.0f} s of processor time"
        elif time.monotonic() - still > MAX_STILL_S and used - cpu < 1.0:
            killed = f"stands still for {MAX_STILL_S:.0f} s"
        if killed:
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    total.seconds += time.monotonic() - began
    case = int.from_bytes(shared[:8], "little")
    for line in text.decode().splitlines():
        number, _, kind = line.partition(" ")
        total.add(kind, int(number))
    total.refused += int.from_bytes(shared[8:], "little")
    code = os.waitstatus_to_exitcode(status)
    total.inputs += case + (code != 0) - first
    if code != 0:
        total.add(killed or f"the process ends with {code}", case)
        return case + 1
    return case


def _work(bench: Bench, cases: range, deadline: float, shared: mmap.mmap, writer: int) -> None:
    refused, number = 0, cases.start
    code = 3
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (1, 2):
            os.dup2(null, fd)
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        _limit()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in cases:
            shared[:8] = number.to_bytes(8, "little")
            kind = bench.feed(*bench.case(number))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MAX_GROWTH_BYTES:
                kind, before = "more than 512 MB", before + grown // 1024
            if kind == "refused":
                refused += 1
                shared[8:] = refused.to_bytes(8, "little")
            elif kind:
                os.write(writer, f"{number} {kind}\n".encode())
            if time.monotonic() > deadline:
                break
        shared[:8] = (number + 1).to_bytes(8, "little")
        code = 0
    except BaseException as error:
        os.write(writer, f"{number} the harness fails: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _limit() -> None:
    """An input may ask for twice the allowance before it gets a MemoryError, so that the machine stays usable."""
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    limit = int(data.split()[1]) * 1024 + 2 * MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def keep(bench: Bench, cases: Sequence[int]) -> Path:
    """Put the smallest of the broken files into the corpus, in a folder named by its content."""
    name, raw = min((bench.case(case) for case in cases[:20]), key=lambda broken: len(broken[1]))
    folder = CORPUS / bench.loader.name / hashlib.sha256(raw).hexdigest()[:12]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return folder


def show(counts: Mapping[str, Count]) -> str:
    lines = [f"{'loader':18} {'inputs':>9} {'refused':>8} {'per s':>7}  findings"]
    for name, count in counts.items():
        rate = count.inputs / count.seconds if count.seconds else 0.0
        lines.append(f"{name:18} {count.inputs:9,} {count.refused:8,} {rate:7.0f}  {sum(count.findings.values())}")
        lines += [
            f"    {number:6,} x {kind} (first: case {count.cases[kind][0]})" for kind, number in count.findings.items()
        ]
    every = counts.values()
    found = sum(sum(count.findings.values()) for count in every)
    return "\n".join([*lines, f"fuzzed: {sum(count.inputs for count in every):,} inputs, {found:,} findings"])


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="divided among the loaders")
    parser.add_argument("--inputs", type=int, default=10**9, help="most inputs of a loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loaders", default=",".join(LOADERS), help="names, separated by commas")
    parser.add_argument("--keep", action="store_true", help="put an input of each kind of finding in the corpus")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    memory = Path("/dev/shm")
    counts: dict[str, Count] = {}
    names = options.loaders.split(",")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for name in names:
            with contextlib.redirect_stderr(sys.stdout):
                bench = Bench(LOADERS[name], Path(scratch), options.seed)
            deadline = time.monotonic() + options.minutes * 60 / len(names)
            counts[name], _ = fuzz(bench, 0, options.inputs, deadline)
            if options.keep:
                for kind, cases in counts[name].cases.items():
                    print(f"kept {keep(bench, cases)}: {kind}")
    print(show(counts))
    return 1 if any(count.findings for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
