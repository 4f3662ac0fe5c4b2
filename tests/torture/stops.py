"""Stop a run at random times, in every way, until it is finished: the same bits, nothing left over, every stop 75.

    python tests/torture/stops.py --minutes 10 --seed 0 --ranks 2
    python tests/torture/stops.py --minutes 10 --jobs 2
    python tests/torture/stops.py --minutes 10 --small-disk

A life of the run is one folder from nothing to its end. Attempt after attempt gets a SIGKILL, a SIGTERM, a SIGINT or a
full disk (RLIMIT_FSIZE) at a random moment; then the same command is left alone, and the folder compared with that of
an undisturbed run. One rank and one job go through forks of this process; several through real processes. A small disk
is a tmpfs that somebody else fills while the command runs; it needs the right to mount one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shim import preloaded
from states import State, differences, remove, show, state_of
from world import Run
from zygote import HUNG, Ended, Orders, Zygote

FULL, FILLED = "disk full", "disk filled"
WAYS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "FULL": FULL}
DISK_BYTES = 64 * 2**20
_PYTHON_STARTS_S = 0.3  # no program can answer a signal before its interpreter runs


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One of WAYS: a signal after so many seconds, or files of at most so many bytes; or a disk filled up by others."""

    how: signal.Signals | str
    seconds: float = 0.0
    file_bytes: int = 0

    def __str__(self) -> str:
        if self.how == FULL:
            return f"{FULL} at {self.file_bytes:,} bytes"
        if self.how == FILLED:
            return f"{FILLED} up to {self.file_bytes:,} bytes after {self.seconds:.2f} s"
        return f"{signal.Signals(int(self.how)).name} after {self.seconds:.2f} s"


@dataclass
class Tally:
    """What was done, how the commands ended, and what is wrong."""

    lives: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ways = ", ".join(f"{number} {how}" for how, number in self.stops.items())
        codes = ", ".join(f"{number} x {code}" for code, number in self.codes.items())
        return f"stops: {self.lives} lives, {ways}; exit codes {codes}; {len(self.findings)} findings"


Command = Callable[[Disturbance | None], Ended]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to disturb, up to `span_s` seconds after a start, and not any more behind `deadline` (monotonic)."""

    span_s: float
    deadline: float
    how: tuple[signal.Signals | str, ...]
    sizes: list[int]
    """Of the files of an undisturbed run, in bytes."""


def life(command: Command, folder: Path, wanted: State, draw: random.Random, tally: Tally, plan: Plan) -> None:
    """From nothing to a finished run, with disturbances on the way; what is wrong goes to the tally's findings."""
    remove(folder)
    history: list[str] = []
    for _ in range(draw.randrange(2, 25)):
        how = draw.choice(plan.how)
        if time.monotonic() > plan.deadline:
            break
        done = Disturbance(
            how, draw.uniform(_PYTHON_STARTS_S, plan.span_s), draw.choice(plan.sizes) + draw.randrange(-1, 2000)
        )
        ended = command(done)
        history.append(str(done))
        name = how if isinstance(how, str) else how.name
        tally.codes[f"{ended.code} after {name}"] += 1
        if ended.code == 0 and how != FULL:
            break
        tally.stops[name] += 1
        tally.findings += [f"{line} [{', '.join(history)}]" for line in _wrong(done, ended)]
    ended = command(None)
    tally.lives += 1
    where = f"[{', '.join(history)}]"
    if ended.code != 0:
        tally.findings.append(f"the same command ends with {ended.code}: {ended.last_line} {where}")
    elif lines := differences(wanted, state_of(folder)):
        tally.findings.append(f"{show(lines)} {where}")


def _wrong(done: Disturbance, ended: Ended) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    expected = {signal.SIGKILL: {-9}, signal.SIGTERM: {75}, signal.SIGINT: {75}, FULL: {0, 4}, FILLED: {4}}[done.how]
    found = [] if ended.code in expected else [f"{ended.code} after {done}: {ended.last_line}"]
    if "Traceback (most recent call last)" in ended.printed:
        found.append(f"a traceback after {done}")
    return found


def forked(run: Run, limit_s: float) -> Command:
    """The command in forks of this process."""

    def command(done: Disturbance | None) -> Ended:
        if done is None:
            return run.zygote.macpo(run.words, Orders(limit_s=limit_s))
        if done.how == FULL:
            return run.zygote.macpo(run.words, Orders(file_bytes=done.file_bytes, limit_s=limit_s))
        if done.how == FILLED:
            with filled(run.folder.parent, done):
                return run.zygote.macpo(run.words, Orders(limit_s=limit_s))
        return run.zygote.macpo(run.words, Orders(signal_after=(int(done.how), done.seconds), limit_s=limit_s))

    return command


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own, of DISK_BYTES, in a new folder."""
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place], check=True, capture_output=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def may_mount(scratch: Path) -> bool:
    try:
        with small_disk(scratch / "tried"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def filled(disk: Path, done: Disturbance) -> Iterator[None]:
    """Another process leaves so few bytes of the disk after so many seconds; afterwards its file is gone."""
    ballast = disk / "ballast"
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            time.sleep(done.seconds)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - done.file_bytes))
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ballast.unlink(missing_ok=True)


def real(run: Run, words: list[str], limit_s: float) -> Command:
    """The command as a process of its own, in a group of its own like a terminal's; SIGINT goes to the whole group."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "TORTURE_CONTROL")}
    printed = run.zygote.output

    def command(done: Disturbance | None) -> Ended:
        def limit() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background job ignores it
            if done is not None and done.how == FULL:
                resource.setrlimit(resource.RLIMIT_FSIZE, (done.file_bytes, done.file_bytes))

        began = time.monotonic()
        with open(printed, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "macpo.cli", *map(str, run.words), *words],
                env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=limit,
            )  # fmt: skip
            try:
                if done is not None and done.how != FULL:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(done.seconds)
                    if process.poll() is None:
                        send = os.killpg if done.how == signal.SIGINT else os.kill
                        send(process.pid, int(done.how))
                code: int | str = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = HUNG
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended(code, printed.read_text(errors="replace"), 0, [], time.monotonic() - began)

    return command


def torture(run: Run, command: Command, options: argparse.Namespace) -> Tally:
    """Lives until the time is up, at least one."""
    tally, draw = Tally(), random.Random(options.seed)
    remove(run.folder)
    began = time.monotonic()
    clean = command(None)
    assert clean.code == 0, clean.printed
    if (lines := differences(run.wanted, state_of(run.folder))) and run.wanted:
        tally.findings.append(f"undisturbed, but not as with one rank and one job: {show(lines)}")
    wanted = state_of(run.folder)
    remove(run.clean)
    shutil.move(run.folder, run.clean)
    how = (FILLED, signal.SIGKILL) if options.small_disk else tuple(WAYS[name] for name in options.how.split(","))
    sizes = sorted(path.stat().st_size for path in run.clean.rglob("*") if path.is_file())
    plan = Plan(max(1.0, clean.seconds * options.span), began + 60 * options.minutes, how, sizes)
    while tally.lives == 0 or time.monotonic() < plan.deadline:
        life(command, run.folder, wanted, draw, tally, plan)
    return tally


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--span", type=float, default=0.5, help="latest moment, as a share of an undisturbed run's time"
    )
    parser.add_argument("--small-disk", action="store_true", help="on a small tmpfs that is filled up (one rank)")
    parser.add_argument(
        "--how", default="KILL,TERM,INT,KILL,TERM,INT,FULL", help="drawn from these (KILL,TERM,INT,FULL)"
    )
    options = parser.parse_args(words)
    if options.small_disk and options.ranks * options.jobs > 1:
        parser.error("--small-disk has one rank and one job")
    return options


def main() -> int:
    options = arguments()
    control, scratch = preloaded()
    if options.small_disk and not may_mount(scratch):
        remove(scratch)
        print("small disk: left out, there is no right to mount one here")
        return 0
    try:
        with small_disk(scratch / "disk") if options.small_disk else contextlib.nullcontext(scratch) as place:
            run = Run(Zygote(control, scratch, place / "run"), jobs=options.jobs)
            words = [f"--ranks={options.ranks}"] if options.ranks > 1 else []
            plain = options.ranks == options.jobs == 1
            if plain:
                run.make_clean()
            tally = torture(run, forked(run, 120.0) if plain else real(run, words, 300.0), options)
    finally:
        remove(scratch)
    for line in tally.findings:
        print(f"finding: {line}")
    print(f"ranks {options.ranks}, jobs {options.jobs}: {tally}")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
