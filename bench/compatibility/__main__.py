"""Write docs/compatibility.md: `python -m bench.compatibility`, about a second for each family on a CPU.

python -m bench.compatibility                      # run every family and write the page
python -m bench.compatibility --check [TYPE ...]   # run all or these, and name the rows that the page has otherwise
python -m bench.compatibility --real FOLDER ...    # run real weights, and write their rows
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from bench.compatibility import page
from bench.compatibility.families import FAMILIES, Family
from bench.compatibility.measure import measure, measure_real


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", nargs="*", metavar="TYPE", help="compare with the page instead of writing it")
    parser.add_argument("--real", nargs="+", type=Path, metavar="FOLDER", help="models with real weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = page.committed()
    if args.real:
        real = found.real | {folder.name: run(folder) for folder in args.real}
        page.PATH.write_text(page.text(replace(found, real=real)), encoding="utf-8")
        return 0
    wanted = [family for family in FAMILIES if family.installed and (not args.check or family.model_type in args.check)]
    lines = {family.name: run(family) for family in wanted}
    if args.check is None:
        made = replace(found, version=transformers.__version__, families=lines)
        page.PATH.write_text(page.text(made), encoding="utf-8")
        return 0
    others = [name for name, line in lines.items() if found.families.get(name) != line]
    print(f"{len(lines)} families, {len(others)} differ from the page: {', '.join(others) or 'none'}")
    return bool(others)


def run(what: Family | Path) -> str:
    """Measure a family, or a folder with real weights, and print its line."""
    with tempfile.TemporaryDirectory() as folder:
        row = measure(what, Path(folder)) if isinstance(what, Family) else measure_real(what, Path(folder))
    line = page.line(row)
    print(line, flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
