"""`macpo compare RECIPE`: the method beside its baselines on the same data, sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from macpo.commands.planning.estimates import Hardware, estimate, hardware_of, size_of
from macpo.commands.run import run
from macpo.comparison.arms import Arms, matched, method_arms, named_arms, teacher_arms
from macpo.comparison.diagnostics import diagnostics
from macpo.comparison.ledger import Ledger, ledgers
from macpo.comparison.results import METHOD, NAIVE, Kind, results
from macpo.config import Recipe
from macpo.engine.errors import ConfigError
from macpo.engine.files import write_json
from macpo.engine.run.folder import read_timing
from macpo.engine.run.run_progress import Part
from macpo.methods.registry import build_plan
from macpo.recipe_kinds import plan_of
from macpo.report.comparison import table, write_comparison
from macpo.report.judged import judged
from macpo.report.run_reader import RunReader


@dataclass(frozen=True, slots=True)
class Comparison:
    """A recipe with an arm for each thing that it is compared with."""

    recipe: Recipe
    kinds: dict[str, Kind]
    """Arm -> what it is."""
    left_out: dict[str, str]
    """Method -> why it cannot run on this recipe."""
    seeds: tuple[int, ...]
    teachers: dict[str, int] = field(default_factory=dict)
    """Number of teachers of the method and of the arms with fewer."""

    def of_seed(self, seed: int) -> Recipe:
        """The recipe of one seed, in a folder of its own."""
        return self.recipe.model_copy(update={"seed": seed, "output": str(Path(self.recipe.output) / f"seed-{seed}")})


def comparison_of(
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    methods: Sequence[str] | None = None,
    k_curve: Sequence[int] = (),
    k_orders: int | None = None,
    ablations: bool = False,
    match_steps: bool = False,
) -> Comparison:
    """The recipe with its arms; the recipe's own `ablations` stay.

    Args:
        methods: names of baselines; None takes all that can run on the recipe's data.
        k_curve: numbers of teachers, each from every place in the ring of teachers, or from `k_orders` of them.
        ablations: add the method without each of its parts.
        match_steps: leave out rounds of baselines whose student would take more optimiser steps than the method's.

    Raises:
        ConfigError: a recipe that is itself a baseline, an unknown method, too many teachers, arms that share a name.
    """
    if recipe.method != "macpo":
        raise ConfigError(f"the recipe's own method is {recipe.method}", "leave `method` out", field="method")
    if k_orders is not None and not k_curve:
        raise ConfigError("it counts the choices of --k-curve", "add --k-curve, or leave it out", field="--k-orders")
    baselines, left_out = method_arms(recipe, None if methods is None else [NAIVE, *methods])
    fewer = teacher_arms(recipe, k_curve, k_orders)
    parts: Arms = named_arms("ablations") if ablations else {}
    taken = [name for name in recipe.ablations if name in {**baselines, **fewer, **parts}]
    if taken:
        raise ConfigError(f"compare has an arm {taken[0]!r} of its own", "give yours another name", field="ablations")
    if match_steps:
        baselines = matched(recipe, baselines, size_of(recipe))
    groups: dict[Kind, Iterable[str]] = {
        "method": baselines,
        "teachers": fewer,
        "ablation": [*parts, *recipe.ablations],
    }
    kinds = {name: kind for kind, names in groups.items() for name in names}
    arms = {**baselines, **fewer, **parts, **recipe.ablations}
    teachers = {name: len(arm["use_teachers"]) for name, arm in fewer.items()}
    if teachers:
        teachers[METHOD] = len(recipe.active_teachers)
    full = recipe.model_copy(update={"ablations": arms})
    return Comparison(full, kinds, left_out, tuple(seeds), teachers)


def compare(comparison: Comparison, *, rerun_stale: bool = False) -> Path:
    """Run every seed to its end, then write `compare.json` and `compare.html`, whose path is returned.

    The same call goes on with a stopped one. Raises MacpoError with its exit code; what does not hold is no error.
    """
    out = Path(comparison.recipe.output)
    if (out / "recipe.yaml").exists():
        raise ConfigError(f"{out} is the folder of one run", "name another folder: --set output=FOLDER", field="output")
    runs, explained, judges = [], {}, {}
    for number, seed in enumerate(comparison.seeds, 1):
        recipe = comparison.of_seed(seed)
        part = Part(f"seed {seed}", number, len(comparison.seeds)) if len(comparison.seeds) > 1 else None
        folder = run(recipe, rerun_stale=rerun_stale, part=part)
        reader = RunReader(folder)
        runs.append(reader.scored)
        judges[seed] = judged(reader)
        gold = recipe.data.world is not None
        explained[seed] = [each.to_json() for each in diagnostics(folder, recipe.student.name, gold=gold)]
    found = results(
        runs,
        comparison.kinds,
        teachers=comparison.teachers,
        ledgers=_measured(comparison, Path(comparison.of_seed(comparison.seeds[0]).output)),
        left_out=comparison.left_out,
    )
    write_json(out / "compare.json", {**found.to_json(), "diagnostics": explained})
    print(table(found))
    page = write_comparison(out, found, explained, judges)
    print(f"\nreport: {page}")
    return page


def _measured(comparison: Comparison, folder: Path) -> dict[str, Ledger]:
    """The ledger of each arm, from what the stages of one seed noted."""
    reader = RunReader(folder)
    counts = {stage.name: read_timing(stage.path).get("counts", {}) for stage in reader.stages}
    recipe = comparison.recipe
    return ledgers(build_plan(recipe), size_of(recipe), recipe, counts)


def planned(comparison: Comparison, hardware: Hardware | None = None) -> str:
    """What a comparison runs and takes, as text: stages, how many are shared, tokens, steps and time. Runs nothing."""
    recipe = comparison.of_seed(comparison.seeds[0])
    plan = plan_of(recipe)
    hardware = hardware or hardware_of(recipe)
    rows = estimate(recipe, plan, hardware)
    arms = {METHOD: "", **{name: name for name in recipe.ablations}}
    alone = {name: len(build_plan(_alone(recipe, arm)).graph.stages) for name, arm in arms.items()}
    shared = 1 - len(rows) / sum(alone.values())
    ledger = ledgers(plan, size_of(recipe), recipe)
    width = max(map(len, [*arms, *comparison.left_out]))
    heads = (("stages", 7), ("own", 5), ("labels", 7), ("generated", 11), ("scored", 11), ("trained", 11), ("steps", 6))
    lines = [" ".join([f"{'arm':{width}}", *(f"{head:>{size}}" for head, size in heads)])]
    for name, arm in arms.items():
        of = ledger[arm]
        lines.append(
            f"{name:{width}} {alone[name]:7} {of.own_stages:5} {of.human_labels:7,} {of.generated:11,} {of.scored:11,} "
            f"{of.trained:11,} {of.student_steps:6,}"
        )
    lines += [f"{name:{width}} left out: {why}" for name, why in comparison.left_out.items()]
    seconds = sum(row.seconds for row in rows) / recipe.compute.jobs
    count = len(comparison.seeds)
    minutes = seconds * count / 60
    lines += [
        "",
        f"{len(rows)} stages a seed; alone the arms would have {sum(alone.values())}: {shared:.0%} are shared",
        f"time: about {minutes:.0f} min for {count} seed{'s' * (count > 1)} on {hardware.machine.name}"
        + (f", {recipe.compute.jobs} stages at once" if recipe.compute.jobs > 1 else "")
        + ("" if hardware.rehearsed or hardware.device == "cuda" else "; --calibrate measures this one"),
    ]
    return "\n".join(lines)


def _alone(recipe: Recipe, arm: str) -> Recipe:
    """The recipe of one arm as a run of its own."""
    return recipe.arm(arm) if arm else recipe.model_copy(update={"ablations": {}})
