"""Put the demo's result into README and docs: `python bench/update_readme.py runs/demo-seeds`.

The folder is what `macpo demo --seeds 200-204` wrote. No number of that section is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import make_pictures  # noqa: E402

from macpo.engine.files import atomic_write  # noqa: E402

START, END = "<!-- demo result: bench/update_readme.py -->", "<!-- end of demo result -->"


def replaced(readme: str, claims: str) -> str:
    """Return the README with a new result section around the text of claims.txt."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n```\n{claims.rstrip()}\n```\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    claims = (folder / "claims.txt").read_text(encoding="utf-8")
    atomic_write(ROOT / "docs" / "demo-claims.txt", claims)
    readme = ROOT / "README.md"
    atomic_write(readme, replaced(readme.read_text(encoding="utf-8"), claims))
    make_pictures.main([str(path) for path in sorted(folder.glob("seed-*"))])


if __name__ == "__main__":
    main()
