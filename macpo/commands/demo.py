"""`macpo demo`: the whole method in the demo world; with several seeds, every claim with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import yaml

from macpo.commands.run import run
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.files import atomic_write
from macpo.evaluation.claims import claims, claims_table
from macpo.report.page import write_seeds_report
from macpo.report.run_reader import RunReader


def demo_recipe(overrides: Sequence[str] = (), *, ablations: bool = False) -> Recipe:
    """The demo's recipe, with the ablation arms where they are asked for."""
    folder = files("macpo.recipes")
    if ablations:
        arms = yaml.safe_load(folder.joinpath("demo-ablations.yaml").read_text(encoding="utf-8"))
        overrides = [f"ablations={json.dumps(arms)}", *overrides]
    with as_file(folder.joinpath("demo.yaml")) as path:
        return recipes.load(path, Recipe, overrides)


def parse_seeds(text: str) -> list[int]:
    """`200-204` or `1,5,9` as a list; raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"got {text!r}", "write seeds as 200-204 or 1,5,9", field="--seeds")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def copy_recipe(name: str, path: Path) -> str:
    """Write one of the package's recipes to `path`, comments included; `list` only names them.

    Raises ConfigError for an unknown name or an existing file.
    """
    folder = files("macpo.recipes")
    files_of = {item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")}
    known = sorted(files_of - {"demo-ablations", "ablations", "methods"})  # arms are no recipes
    if name == "list":
        return "\n".join(known)
    if name not in known:
        raise ConfigError(f"no recipe {name!r}", f"one of {', '.join(known)}", field="--like")
    if path.exists():
        raise ConfigError(f"{path} exists", "name a new file")
    atomic_write(path, folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return f"wrote {path}; next: macpo check {path}"


def run_seeds(seeds: Sequence[int], out: Path, overrides: Sequence[str] = (), *, rerun_stale: bool = False) -> Path:
    """One run with all ablation arms a seed; writes `claims.json` and the comparison's `report.html` into `out`."""
    summaries = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        recipe = demo_recipe([*overrides, f"seed={seed}", f"output={json.dumps(str(folder))}"], ablations=True)
        run(recipe, rerun_stale=rerun_stale)
        summaries.append(RunReader(folder).summary)
    found = claims(summaries)
    report = write_seeds_report(out, summaries, found)
    print(claims_table(found, summaries[0]["metric"]))
    print(f"\nreport: {report}")
    return report
