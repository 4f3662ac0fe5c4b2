"""Kill a run at every call that changes a file: before it, after it and in the middle of what it writes.

    python tests/torture/kills.py --minutes 60 --seed 0 --slice 1/2

Every trial is a real SIGKILL of `macpo run` and the same command again. It begins where all earlier stages are
committed and ends behind the commit of the stage that was hit: whoever is then in the state of an undisturbed run ends
as it does. A state of the folder that an earlier kill has left byte by byte is not resumed again.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shim import Call, Kill, preloaded
from states import differences, exact, remove, replace, show, state_of
from world import Run, Segment, same_calls
from zygote import Ended, Orders, Zygote


@dataclass(frozen=True, slots=True)
class Trial:
    segment: Segment
    call: Call
    way: str

    def __str__(self) -> str:
        place = self.call.path.rpartition("/run/")[2] or "."
        return f"{self.segment.stage}, {self.way} call {self.call.number}, {self.call.name} {place}"


@dataclass
class Tally:
    """What was tried and what it showed."""

    kills: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    findings: list[str] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    def __str__(self) -> str:
        ways = ", ".join(f"{number} {way}" for way, number in self.kills.items())
        number = sum(self.kills.values())
        return f"kills: {number} ({ways}), {self.resumed} states resumed, {len(self.findings)} findings"


def trials(segments: Sequence[Segment]) -> list[Trial]:
    """Every call of every segment in every way; what a start does is tried in an empty, a begun and a finished run."""
    whole = {segments[0].stage, segments[1].stage, segments[-1].stage}
    found = []
    for segment in segments:
        start = 1 if segment.stage in whole else segment.first
        found += [Trial(segment, call, way) for call in segment.calls[start - 1 :] for way in call.ways]
    return found


def chosen(every: Sequence[Trial], seed: int, per_kind: int) -> list[Trial]:
    """A few trials of each kind of call and way."""
    kinds: dict[tuple[str, str], list[Trial]] = {}
    for trial in every:
        kinds.setdefault((trial.call.name, trial.way), []).append(trial)
    draw = random.Random(seed)
    return [trial for _, found in sorted(kinds.items()) for trial in draw.sample(found, min(per_kind, len(found)))]


def attempt(run: Run, trial: Trial, tally: Tally) -> None:
    """One kill and one resume; what is wrong goes to the tally's findings."""
    segment = trial.segment
    replace(run.folder, segment.before)
    kill = Kill(trial.call.number, trial.way)
    ended = run.zygote.macpo(run.words, Orders(kill, until=segment.until))
    if ended.code != -signal.SIGKILL:
        tally.findings.append(f"{trial}: the call is not reached again, exit code {ended.code}: {ended.last_line}")
        return
    tally.kills[trial.way] += 1
    left = (segment.stage, exact(run.folder))
    if left in tally.seen:
        return
    tally.seen.add(left)
    tally.resumed += 1
    again = run.zygote.macpo(run.words, Orders(until=segment.until))
    tally.findings += [f"{trial}: {line}" for line in judged(run, segment, again)]


def judged(run: Run, segment: Segment, ended: Ended) -> Iterator[str]:
    """What is wrong with a run that was resumed in the segment."""
    if ended.code == 0 and segment.until and not differences(run.wanted, state_of(run.folder)):
        return  # the kill hit behind the commit, and nothing was left to stop at
    expected = 75 if segment.until else 0
    if ended.code != expected:
        yield f"the same command ends with {ended.code} instead of {expected}: {ended.last_line}"
        return
    lines = differences(state_of(segment.after), state_of(run.folder))
    if lines:
        yield show(lines)


def progress(done: int, every: int, tally: Tally, began: float) -> None:
    if sys.stderr.isatty() or done % 200 == 0:
        minutes = (time.monotonic() - began) / 60
        print(f"{done}/{every} kills, {len(tally.findings)} findings, {minutes:.1f} min", file=sys.stderr, flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many (default: when all are done)")
    parser.add_argument("--seed", type=int, default=0, help="order of the trials, and which are chosen")
    parser.add_argument("--per-kind", type=int, help="only so many of each kind of call and way")
    parser.add_argument(
        "--stages", type=int, help="only the first stages of the run, without an uninterrupted run before"
    )
    parser.add_argument("--slice", default="1/1", help="K/N: the Kth of N parts, for several machines or cores")
    return parser.parse_args(words)


def main() -> int:
    options = arguments()
    control, scratch = preloaded()
    try:
        tally = torture(Run(Zygote(control, scratch, scratch / "run")), options)
    finally:
        remove(scratch)
    for line in tally.findings:
        print(f"finding: {line}")
    print(tally)
    return 1 if tally.findings else 0


def torture(run: Run, options: argparse.Namespace) -> Tally:
    """The trials that the options ask for, or as many as there is time for."""
    began = time.monotonic()
    whole = run.make_clean().calls if options.stages is None else []
    segments = run.segments(options.stages)
    every = trials(segments)
    calls = whole or [call for segment in segments for call in segment.calls]
    print(f"{len(segments)} segments, {len(calls)} calls: {dict(Counter(call.name for call in calls).most_common())}")
    tally = Tally()
    if whole and (why := same_calls(whole, segments)):
        tally.findings.append(why)
    wanted = chosen(every, options.seed, options.per_kind) if options.per_kind else every
    part, parts = map(int, options.slice.split("/"))
    wanted = random.Random(options.seed).sample(wanted, len(wanted))[part - 1 :: parts]
    for done, trial in enumerate(wanted, 1):
        if (time.monotonic() - began) / 60 > options.minutes:
            break
        attempt(run, trial, tally)
        progress(done, len(wanted), tally, began)
    print(f"{sum(tally.kills.values())} of {len(every)} kills in {(time.monotonic() - began) / 60:.1f} min")
    return tally


if __name__ == "__main__":
    sys.exit(main())
