"""Resident memory of a run of many iterations, every policy trained in full: it must not grow with the iterations.

    python tests/torture/memory.py --iterations 6 --width 512

What is kept of an iteration that no later stage needs would show as one policy more a teacher and a student each time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from tiny import init, tiny

SAMPLE_S = 0.02


def peaks(run: Path, command: list[str]) -> dict[int, int]:
    """Iteration -> most bytes that the command's processes held while its stages ran; 0 is what comes before."""
    found: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                resident = watched.memory_info().rss + sum(each.memory_info().rss for each in watched.children(True))
            except psutil.Error:
                continue
            begun = [path.name for path in run.glob("*-*")]
            now = max((int(t) for name in begun for t in re.findall(r"-iter(\d+)", name)), default=0)
            found[now] = max(found.get(now, 0), resident)
            time.sleep(SAMPLE_S)
    if process.returncode != 0:
        raise SystemExit(f"the run ended with {process.returncode}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="hidden size of every model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        models = [init(options.width), init(options.width, "bpe"), init(options.width)]
        full = [{"init": {**each, "num_layers": 4, "num_heads": 8}, "tuning": {"type": "full"}} for each in models]
        recipe = tiny(run, iterations=options.iterations, teachers=full[:2], student=full[2])
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
        found = peaks(run, [sys.executable, "-P", "-m", "macpo.cli", "run", str(path)])
        policy = max(each.stat().st_size for each in run.rglob("model.safetensors"))
    print(f"one policy: {policy / 2**20:.0f} MiB; resident at most, by iteration:")
    for iteration, peak in sorted(found.items()):
        print(f"  {iteration}: {peak / 2**20:.0f} MiB")
    early, late = found[2], max(peak for iteration, peak in found.items() if iteration > 2)
    grows = late - early > policy / 2
    print(f"memory: {'grows' if grows else 'does not grow'} ({(late - early) / 2**20:+.0f} MiB after iteration 2)")
    return int(grows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
