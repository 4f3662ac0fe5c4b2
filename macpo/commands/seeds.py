"""Several seeds of one recipe: a run folder for each, and every claim over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from macpo.config import Recipe
from macpo.engine.errors import ConfigError
from macpo.engine.run.run_progress import Part
from macpo.evaluation.claims import claims, claims_table, shared_metric
from macpo.recipe_kinds import AnyRecipe
from macpo.report.run_reader import RunReader


def parse_seeds(text: str) -> list[int]:
    """`200-204` or `1,5,9` as a list; raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"got {text!r}", "write seeds as 200-204 or 1,5,9", field="--seeds")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def check_kind(recipe: AnyRecipe) -> None:
    """Raise ConfigError for a kind of recipe that makes no claims, by which seeds could be compared."""
    if not isinstance(recipe, Recipe):
        fix = f"run `recipe: {recipe.recipe}` once a seed, with --set seed=N --set output=FOLDER"
        raise ConfigError("--seeds compares the claims of `recipe: macpo`, which this recipe has none of", fix)


def run_seeds(seeds: Sequence[int], out: Path, run_one: Callable[[list[str], Part], object]) -> Path:
    """Run every seed in `out/seed-N`, then write `claims.json` and their `report.html` into `out`; return its path.

    `run_one`: runs the recipe under these further overrides, as one part of several, to its end. The same call resumes
    a stopped one.
    Raises ConfigError where `out` is the folder of a single run.
    """
    if (out / "recipe.yaml").exists():
        raise ConfigError(
            f"{out} is the folder of one run", "name another folder for the seeds (output)", field="--seeds"
        )
    runs = []
    for number, seed in enumerate(seeds, 1):
        folder = out / f"seed-{seed}"
        run_one([f"seed={seed}", f"output={json.dumps(str(folder))}"], Part(f"seed {seed}", number, len(seeds)))
        runs.append(RunReader(folder).scored)
    found = claims(runs)
    from macpo.report.page import write_seeds_report  # with matplotlib, once all seeds have run

    report = write_seeds_report(out, runs, found)
    print(claims_table(found, shared_metric([run.summary for run in runs])))
    print(f"\nreport: {report}")
    return report
