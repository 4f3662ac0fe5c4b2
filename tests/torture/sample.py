"""Some kills, stops and spoilt files in one process and of one run: what tests have time for.

python tests/torture/sample.py
"""

from __future__ import annotations

import sys

import corruption
import kills
import stops
from shim import preloaded
from states import remove
from world import Run
from zygote import Zygote

KILLS = ("--stages=4", "--per-kind=1", "--seed=1")
STOPS = ("--minutes=0.15", "--how=KILL,TERM,INT,FULL", "--span=0.3", "--seed=1")
SPOILT = ("--minutes=0.07", "--seed=1")


def main() -> int:
    control, scratch = preloaded()
    try:
        run = Run(Zygote(control, scratch, scratch / "run"))
        calls = run.make_clean().calls
        tallies = [
            kills.torture(run, kills.arguments(KILLS)),
            corruption.torture(run, calls, corruption.arguments(SPOILT)),
            stops.torture(run, stops.forked(run, limit_s=120.0), stops.arguments(STOPS)),  # it moves the clean run
        ]
    finally:
        remove(scratch)
    for tally in tallies:
        print(*(f"finding: {line}" for line in tally.findings), tally, sep="\n")
    return 1 if any(tally.findings for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
