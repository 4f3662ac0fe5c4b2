"""Runs pytest and writes how it ended, and on what it ran: `python -m bench.harness.pytest_report FILE ARGUMENTS`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.harness.device import default_device, provenance

if __name__ == "__main__":
    path, *arguments = sys.argv[1:]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    body = {
        **provenance(default_device()),
        "tests": lines[-1].strip("= ") if lines else "nothing ran",
        "failed": failed,
    }
    Path(path).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(done.returncode)
