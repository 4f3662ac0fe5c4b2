"""Put what the demo world finds, and the table of speeds, into README and docs.

    python -m bench.evidence.update_readme bench/results/demo-world

The folder holds the runs' files (bench/evidence/runs.py). No number of those sections is typed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.evidence import speed
from bench.evidence.paper_claims import answers, by_round, markdown, read_all
from bench.make_pictures import demo_svg
from macpo.engine.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]

DEMO, SPEED = "demo result", "speed"


def replaced(page: str, section: str, text: str) -> str:
    """Return a page with a new text in the section. Raises ValueError for a page without it."""
    start, end = f"<!-- {section}: bench/evidence/update_readme.py -->", f"<!-- end of {section} -->"
    before, opened, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"the page has no section {section!r}")
    return f"{before}{start}\n{text.rstrip()}\n{end}{after}"


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
    for page, section, text in sections(rounds, claims):
        atomic_write(page, replaced(page.read_text(encoding="utf-8"), section, text))
    atomic_write(ROOT / "docs" / "demo.svg", picture)


def sections(rounds: str, claims: str) -> list[tuple[Path, str, str]]:
    """Every section that is made: its page, name and text."""
    readme, docs = ROOT / "README.md", ROOT / "docs"
    return [
        (readme, DEMO, rounds),
        (docs / "demo-world.md", DEMO, claims),
        (readme, SPEED, speed.markdown(speed.rows())),
    ]


if __name__ == "__main__":
    main()
