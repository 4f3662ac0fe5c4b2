"""Run tests in a fresh environment with other versions of the dependencies; docs/compatibility.md gets a row.

python -m bench.compatibility.versions oldest                          # the lower bounds of pyproject.toml, SELECTION
python -m bench.compatibility.versions newest --pin torch==2.14.1      # the newest of the index, but for these
python -m bench.compatibility.versions pinned --all                    # constraints.txt, the whole suite
python -m bench.compatibility.versions newest --python python3.13 tests/kernels -x      # pytest's own words

The environment (some 6 GB where torch comes with CUDA) and a copy of the tree stay in build/versions/SET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from bench.compatibility import page

ROOT = Path(__file__).resolve().parents[2]
SETS = ("oldest", "pinned", "newest")
SELECTION = (
    "tests/kernels/triton_backend/test_triton_head.py",
    "tests/kernels/triton_backend/test_triton_decode.py",
    "tests/engine/recipe",
    "tests/engine/data",
    "tests/engine/models/test_model.py",
    "tests/macpo/test_method.py::test_every_agent_is_evaluated_at_every_iteration",
    "tests/macpo/test_method.py::test_filter_scores_equal_recomputed_reference_logps",
)
"""Triton's kernels under its interpreter, recipes, data, models and one whole loop: some minutes on two cores."""


def constraints(name: str, pins: Sequence[str]) -> list[str]:
    """Lines of pip's constraints file for a set; a pin takes the place of what the set says of that package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    lines = {
        "oldest": [line.replace(">=", "==") for line in bounds if ">=" in line],
        "pinned": [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")],
        "newest": [],
    }[name]
    return [*(line for line in lines if _package(line) not in map(_package, pins)), *pins]


def _package(requirement: str) -> str:
    return re.split(r"[=<>!~; \[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def install(name: str, pins: Sequence[str], python: str) -> Path:
    """A fresh environment with a copy of the tree, in build/versions; returns its folder."""
    folder = ROOT / "build" / "versions" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.check_output(words, cwd=ROOT, text=True).split("\0"):
        if file and (ROOT / file).is_file():
            copy = folder / "source" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, copy)
    limits = folder / "constraints.txt"
    limits.write_text("\n".join([*constraints(name, pins), ""]), encoding="utf-8")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    pip: list[str | Path] = [
        folder / "venv" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        limits,
    ]
    subprocess.run([*pip, "-e", f"{folder / 'source'}[dev,docs]"], check=True)
    return folder


def test(folder: Path, words: Sequence[str]) -> str:
    """Run pytest on the copy of the tree; returns its counts."""
    result = folder / "result.xml"
    command = [folder / "venv" / "bin" / "python", "-m", "pytest", "-q", f"--junit-xml={result}", *words]
    subprocess.run(command, cwd=folder / "source", env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    found = ElementTree.parse(result).getroot().find("testsuite")
    assert found is not None
    bad, skipped = int(found.get("failures", 0)) + int(found.get("errors", 0)), int(found.get("skipped", 0))
    counts = {"passed": int(found.get("tests", 0)) - bad - skipped, "failed": bad, "skipped": skipped}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def versions(folder: Path) -> list[str]:
    """Python's version and those of `page.PACKAGES` in the environment."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))"
    )
    return list(json.loads(subprocess.check_output([folder / "venv" / "bin" / "python", "-c", code, *page.PACKAGES])))


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--pin", action="append", default=[], metavar="REQUIREMENT", help="as often as needed")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    parser.add_argument("--all", action="store_true", help="the whole suite")
    args, words = parser.parse_known_args()
    folder = install(args.set, args.pin, args.python)
    counts = test(folder, words or ([] if args.all else SELECTION))
    shown = versions(folder)
    print(f"{args.set}: {', '.join(map(' '.join, zip(('python', *page.PACKAGES), shown, strict=True)))}: {counts}")
    if not words:  # a row stands for the selection or for all
        found = page.committed()
        line = page.cells(f"`{args.set}`", *shown, "all" if args.all else "selection", counts)
        lines = found.versions | {args.set: line}
        made = replace(found, versions={name: lines[name] for name in SETS if name in lines})
        page.PATH.write_text(page.text(made), encoding="utf-8")
    return "failed" in counts


if __name__ == "__main__":
    sys.exit(main())
