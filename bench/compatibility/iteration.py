"""One MACPO iteration of real models in float32 and in bfloat16: time, peak memory and the run's own scores.

    python -m bench.compatibility.iteration --set data.path=PATH [--set teachers.0.model=DIR] [--out DIR] [--json PATH]

Runs recipes/small-models.yaml once a dtype, in a process of its own, one after the other; the recipe's other settings
are overridden with --set. Times are those of this machine at this hour: read their ratio, and on a machine that does
other work too the ratio of the processors' time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.device import provenance

RECIPE = Path(__file__).parents[2] / "recipes" / "small-models.yaml"
DTYPES = ("float32", "bfloat16")
SHOWN = ("preference_accuracy", "preference_accuracy_se", "logp_margin_per_token")


def run(dtype: str, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Run the recipe; returns seconds by the clock and of the processors, the peak resident bytes of its process, and
    each agent's scores by iteration.

    Raises:
        RuntimeError: the run failed.
    """
    command = [str(Path(sys.executable).with_name("macpo")), "run", str(RECIPE)]
    for override in (*overrides, f"compute.dtype={dtype}", "compute.jobs=1", f"output={out}"):
        command += ["--set", override]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    summary = json.loads((out / "summary.json").read_text())
    scores = {name: agent["scores"] for name, agent in summary["agents"].items()}
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024, "scores": scores}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| dtype | minutes | CPU minutes | peak memory |", "|---|---|---|---|"]
    for name, row in found.items():
        minutes, cpu = row["seconds"] / 60, row["cpu_seconds"] / 60
        lines.append(f"| {name} | {minutes:.1f} | {cpu:.1f} | {row['peak_bytes'] / 1e9:.2f} GB |")
    lines += ["", f"| agent | iteration | dtype | {' | '.join(SHOWN)} |", "|---|---|---|" + "---|" * len(SHOWN)]
    for name, row in found.items():
        for agent, scores in row["scores"].items():
            for score in scores:
                values = " | ".join(f"{score[metric]:.3f}" if metric in score else "" for metric in SHOWN)
                lines.append(f"| {agent} | {score['iteration']} | {name} | {values} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override of the recipe")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="keep the runs there, in folders by dtype")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="macpo-iteration-") as temporary:
        out = args.out or Path(temporary)
        found = {dtype: run(dtype, args.set, out / dtype) for dtype in args.dtype}
    print(table(found))
    if args.json:
        made = {"about": provenance(torch.device("cpu")), "runs": found}
        args.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
