"""Write docs/compatibility.md: `python -m bench.compatibility`; with model types after it, only print their rows.

Every row comes from running a tiny random model of the family; about a second each on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench.compatibility import page
from bench.compatibility.families import FAMILIES
from bench.compatibility.measure import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="print the rows of these instead of writing the page")
    wanted = parser.parse_args().model_types
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        if family.installed and (not wanted or family.model_type in wanted):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(family, Path(folder)))
            print(page.line(rows[-1]), flush=True)
    if not wanted:
        page.PATH.write_text(page.text(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
