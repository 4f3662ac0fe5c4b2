"""Stop a run at random times, in every way, until it is finished: the same bits, nothing left over, every stop 75.

    python tests/torture/stops.py --minutes 10 --seed 0 --ranks 2
    python tests/torture/stops.py --minutes 10 --jobs 2

A life of the run is one folder from nothing to its end. Attempt after attempt gets a SIGKILL, a SIGTERM, a SIGINT or a
full disk (RLIMIT_FSIZE) at a random moment; then the same command is left alone, and the folder compared with that of
an undisturbed run. One rank and one job go through forks of this process; several through real processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shim import preloaded
from states import State, differences, remove, show, state_of
from world import Run
from zygote import HUNG, Ended, Orders, Zygote

FULL = "disk full"
HOW = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, FULL)
_PYTHON_STARTS_S = 0.3  # no program can answer a signal before its interpreter runs


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One of HOW: a signal after so many seconds, or files of at most so many bytes."""

    how: signal.Signals | str
    seconds: float = 0.0
    file_bytes: int = 0

    def __str__(self) -> str:
        if self.how == FULL:
            return f"{FULL} at {self.file_bytes:,} bytes"
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
    """When to disturb: up to `span_s` seconds after a start, and not any more behind `deadline` (monotonic)."""

    span_s: float
    deadline: float


def life(command: Command, folder: Path, wanted: State, draw: random.Random, tally: Tally, plan: Plan) -> None:
    """From nothing to a finished run, with disturbances on the way; what is wrong goes to the tally's findings."""
    remove(folder)
    history: list[str] = []
    sizes = sorted(path.stat().st_size for path in (folder.parent / "clean").rglob("*") if path.is_file())
    for _ in range(draw.randrange(2, 25)):
        how = draw.choice((*HOW[:3], *HOW))  # a full disk less often
        if time.monotonic() > plan.deadline:
            break
        done = Disturbance(
            how, draw.uniform(_PYTHON_STARTS_S, plan.span_s), draw.choice(sizes) + draw.randrange(-1, 2000)
        )
        ended = command(done)
        history.append(str(done))
        name = FULL if how == FULL else signal.Signals(int(how)).name
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
    expected = {signal.SIGKILL: {-9}, signal.SIGTERM: {75}, signal.SIGINT: {75}, FULL: {0, 4}}[done.how]  # type: ignore[index]
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
        return run.zygote.macpo(run.words, Orders(signal_after=(int(done.how), done.seconds), limit_s=limit_s))

    return command


def real(run: Run, words: list[str], limit_s: float) -> Command:
    """The command as a process of its own, in a group of its own like a terminal's; SIGINT goes to the whole group."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "TORTURE_CONTROL")}
    printed = run.zygote.output

    def command(done: Disturbance | None) -> Ended:
        def limit() -> None:
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
    run.folder.rename(run.clean)
    plan = Plan(max(1.0, clean.seconds * options.span), began + 60 * options.minutes)
    while tally.lives == 0 or time.monotonic() < plan.deadline:
        life(command, run.folder, wanted, draw, tally, plan)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--span", type=float, default=0.5, help="latest moment, as a share of an undisturbed run's time"
    )
    options = parser.parse_args()
    control, scratch = preloaded()
    try:
        run = Run(Zygote(control, scratch, scratch / "run"), jobs=options.jobs)
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
