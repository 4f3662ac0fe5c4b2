"""Runs every benchmark on the device at hand within a time limit, and prints one table: `make bench`.

    python -m bench.run_all [--minutes 8] [--shapes small|issue|gpu] [--device cpu] [--json-dir DIR]

Each script is a process of its own, so that one's compiled code and memory do not weigh on the next. Scripts share
the time in fixed parts; what a script does not use goes to those after it. Cases that do not fit are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.device import default_device, device_name, device_slug
from bench.harness.measure import LEGEND, RESULTS, Result, header, row_text
from bench.harness.options import SHAPES

# Parts of the time: the head benchmarks compile most and have the largest inputs.
PARTS = {"pair_loss": 8, "linear_logp": 5, "prefix_attention": 3, "paged_attention": 2, "sampling": 2}


def run_scripts(seconds: float, options: Sequence[str]) -> dict[str, str]:
    """Run every script; return what went wrong with those that did not finish, by name."""
    end = time.monotonic() + seconds
    problems: dict[str, str] = {}
    for number, name in enumerate(PARTS):
        left = end - time.monotonic()
        share = left * PARTS[name] / sum(list(PARTS.values())[number:])
        command = [sys.executable, "-m", f"bench.bench_{name}", "--seconds", f"{share * 0.8:.0f}", *options]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        try:
            done = subprocess.run(command, timeout=max(20.0, share * 1.2), check=False)
            if done.returncode:
                problems[name] = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            problems[name] = f"stopped after {share * 1.2:.0f} s"
    return problems


def summary(folder: Path, problems: dict[str, str]) -> Iterator[str]:
    """Format one table from the files that the scripts of this run wrote."""
    yield LEGEND
    for name in PARTS:
        path = folder / f"{name}.json"
        if name in problems or not path.exists():
            yield f"\n{name}: {problems.get(name, 'no result')}"
        if not path.exists():
            continue
        body = json.loads(path.read_text(encoding="utf-8"))
        for case in body["cases"]:
            yield f"\n{name}: {case['name']}  [{case['ceiling']}]"
            yield header()
            absent: dict[str, list[str]] = {}
            for result in map(result_of, case["results"]):
                if result.status == "absent":
                    absent.setdefault(result.reason, []).append(result.peer)
                else:
                    yield "  " + row_text(result)
            for reason, peers in absent.items():
                yield f"  not here: {', '.join(peers)}: {reason}"
        for skipped in body["skipped"]:
            yield f"\n{name}: {skipped}: not run"


def result_of(fields: dict[str, Any]) -> Result:
    """Rebuild a result from JSON, where infinite errors are null."""
    errors = {name: float("inf") if error is None else error for name, error in fields["errors"].items()}
    return Result(**{**fields, "errors": errors})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--shapes", choices=SHAPES, help="default: gpu on a GPU, else issue")
    parser.add_argument("--peers", metavar="NAME,...", help="besides ours only peers whose name holds one of these")
    parser.add_argument("--json-dir", type=Path)
    args = parser.parse_args(argv)
    folder = args.json_dir or RESULTS / device_slug(args.device)
    options = ["--device", str(args.device), "--json-dir", str(folder)]
    for name in ("shapes", "peers"):
        if getattr(args, name):
            options += [f"--{name}", getattr(args, name)]
    for name in PARTS:
        (folder / f"{name}.json").unlink(missing_ok=True)  # the table is this run's
    start = time.monotonic()
    problems = run_scripts(args.minutes * 60 - 10, options)
    print(f"\n==== {device_name(args.device)}, torch {torch.__version__}, {time.monotonic() - start:.0f} s")
    print("\n".join(summary(folder, problems)))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
