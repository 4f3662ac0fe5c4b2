"""Put what the demo world finds into README and docs.

    python -m bench.evidence.update_readme bench/results/demo-world

The folder holds the runs' files (bench/evidence/runs.py). No number of those sections is typed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.evidence.paper_claims import answers, by_round, markdown, read_all
from bench.make_pictures import demo_svg
from macpo.engine.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]

START, END = "<!-- demo result: bench/evidence/update_readme.py -->", "<!-- end of demo result -->"


def replaced(page: str, text: str) -> str:
    """Return a page with a new result section around the text."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{text.rstrip()}\n{END}{after}"


def texts(folder: Path) -> tuple[str, str, str]:
    """Return README's table, the docs' table and the picture."""
    seeds = read_all(folder)
    rounds, claims = by_round(seeds), markdown(answers(seeds))
    said = f"Mean gold score over seeds {', '.join(str(seed.seed) for seed in seeds)}:"
    return f"{said}\n\n{rounds}", f"{said}\n\n{rounds}\n\n{claims}", demo_svg([seed.summary for seed in seeds])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", type=Path)
    rounds, claims, picture = texts(parser.parse_args(argv).folder)
    for page, text in {ROOT / "README.md": rounds, ROOT / "docs" / "demo-world.md": claims}.items():
        atomic_write(page, replaced(page.read_text(encoding="utf-8"), text))
    atomic_write(ROOT / "docs" / "demo.svg", picture)


if __name__ == "__main__":
    main()
