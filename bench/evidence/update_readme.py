"""Put what the demo world finds, and the table of speeds, into README and docs.

    python -m bench.evidence.update_readme

The runs' files (bench/evidence/runs.py) are those of bench/results. No number of those sections is typed by hand.
The comparison's tables wait for all seeds that were announced: whoever looks earlier and stops where it suits finds
what is not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.evidence import speed, world_gates
from bench.evidence.paper_claims import Seed, answers, arms_by_round, by_round, markdown, read_all
from bench.harness.measure import RESULTS
from bench.make_pictures import demo_svg
from macpo.engine.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]

DEMO, COMPARISON, GATES, SPEED = "demo result", "comparison result", "gates", "speed"
ANNOUNCED = 10
"""Seeds of the comparison, 300 to 309, fixed before the first of them ran."""
README_QUESTIONS = (
    "final student above the naive one",
    "final student above the best initial teacher",
    "teachers, last round above the start",
    "above filtered labels and SFT",
    "above SFT on the selected positives, equal steps",
    "above SPIN",
    "hard above weak negatives",
    "mutual above own positives",
    "lowest perplexity above random selection",
    "mutual learning above fixed teachers",
    "5 above 1 teacher, round 3",
)


def replaced(page: str, section: str, text: str) -> str:
    """Return a page with a new text in the section. Raises ValueError for a page without it."""
    start, end = f"<!-- {section}: bench/evidence/update_readme.py -->", f"<!-- end of {section} -->"
    before, opened, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"the page has no section {section!r}")
    return f"{before}{start}\n{text.rstrip()}\n{end}{after}"


def demo_text(seeds: Sequence[Seed]) -> str:
    """Return the docs' tables of the demo."""
    return "\n\n".join([_mean_over(seeds), by_round(seeds), markdown(answers(seeds))])


def comparison_texts(seeds: Sequence[Seed]) -> tuple[str, str]:
    """Return README's table and the docs'; a sentence each before all seeds are there."""
    if len(seeds) < ANNOUNCED:
        waiting = f"Seeds done: {len(seeds)} of {ANNOUNCED}. The table comes with the last one."
        return waiting, waiting
    said, rounds, found = _mean_over(seeds), by_round(seeds), answers(seeds)
    kept = [row for row in found if row.question in README_QUESTIONS]
    docs = [said, rounds, arms_by_round(seeds), markdown(found)]
    return f"{said}\n\n{rounds}\n\n{markdown(kept)}", "\n\n".join(docs)


def _mean_over(seeds: Sequence[Seed]) -> str:
    return f"Mean gold score over seeds {', '.join(str(seed.seed) for seed in seeds)}:"


def sections(demo: Sequence[Seed], comparison: Sequence[Seed]) -> list[tuple[Path, str, str]]:
    """Every section that is made: its page, name and text."""
    readme, docs = ROOT / "README.md", ROOT / "docs"
    compared_short, compared_long = comparison_texts(comparison)
    gates = {"demo": RESULTS / "demo-world" / "gates.json", "demo-compare": RESULTS / "demo-compare" / "gates.json"}
    return [
        (docs / "demo-world.md", DEMO, demo_text(demo)),
        (readme, COMPARISON, compared_short),
        (docs / "demo-world.md", COMPARISON, compared_long),
        (docs / "demo-world.md", GATES, world_gates.markdown(gates)),
        (readme, SPEED, speed.markdown(speed.rows())),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(allow_abbrev=False, description=__doc__).parse_args(argv)
    demo, comparison = (read_all(RESULTS / name) for name in ("demo-world", "demo-compare"))
    for page, section, text in sections(demo, comparison):
        atomic_write(page, replaced(page.read_text(encoding="utf-8"), section, text))
    atomic_write(ROOT / "docs" / "demo.svg", demo_svg([seed.summary for seed in comparison]))


if __name__ == "__main__":
    main()
