"""From a recipe to a finished run: stages, then summary.json, table and report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from macpo import __version__
from macpo.commands.check import check_templates
from macpo.commands.preflight import preflight
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.distributed.agree import on_main
from macpo.engine.distributed.world import World
from macpo.engine.errors import MacpoError
from macpo.engine.files import atomic_write, write_json
from macpo.engine.removal import make_way
from macpo.engine.run.folder import RunFolder
from macpo.engine.run.runner import Runner
from macpo.engine.run.workers import Workers
from macpo.evaluation.summary import AgentHistory, build_summary
from macpo.method.run_plan import Plan
from macpo.recipe_kinds import AnyRecipe, load, plan_of
from macpo.report.findings import table
from macpo.report.page import write_report
from macpo.report.run_reader import RunReader

TITLES = {"sft": "Supervised fine-tuning", "preference": "Preference training"}
GRAPH_BUILDER = "macpo.recipe_kinds:build_graph"


def run_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    world: World | None = None,
    rerun_stale: bool = False,
    from_stage: str | None = None,
) -> Path:
    """Entry point of `macpo run` and `torchrun engine/train.py`: the recipe of a file, run to its end."""
    world = world or World.current()
    try:
        recipe = load(path, overrides)
    except MacpoError as error:
        error.relayed = not world.is_main  # every rank finds it, one says it
        raise
    return run(recipe, world=world, rerun_stale=rerun_stale, from_stage=from_stage)


def runner_of(
    recipe: AnyRecipe,
    plan: Plan,
    *,
    world: World | None = None,
    rerun_stale: bool = False,
    from_stage: str | None = None,
) -> Runner:
    """The runner of a recipe's plan; also answers `macpo status`."""
    compute = recipe.compute
    return Runner(
        Path(recipe.output),
        plan.graph,
        world=world,
        rerun_stale=rerun_stale,
        from_stage=from_stage,
        workers=Workers(
            jobs=compute.jobs if world is None or world.size == 1 else 1,  # ranks share every stage instead
            threads=compute.threads,
            build=(GRAPH_BUILDER, recipe.model_dump(mode="json")),
        ),
    )


def run(
    recipe: AnyRecipe, *, world: World | None = None, rerun_stale: bool = False, from_stage: str | None = None
) -> Path:
    """Run every stage that is not done, then write summary and report; returns the run's folder.

    Raises MacpoError with its exit code; the same call resumes a stopped run.
    """
    world = world or World.current()
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    run_dir = Path(recipe.output)
    plan = plan_of(recipe, must_exist=False)
    finished = from_stage is None and on_main(world, lambda: is_finished(recipe, plan))
    if not finished:  # a finished run needs neither its data nor its models
        on_main(world, lambda: preflight(recipe, plan, ranks=world.size))
        if RunFolder(run_dir).committed("data") is None:
            on_main(world, lambda: check_templates(recipe))
        plan = plan_of(recipe) if plan.identities.unknown else plan
    runner = runner_of(recipe, plan, world=world, rerun_stale=rerun_stale, from_stage=from_stage)
    runner.began = lambda: _note_recipe(recipe, run_dir, runner.log)
    runner.run()
    if world.is_main:
        for name in ("summary.json", "report.html"):
            make_way(run_dir / name, run_dir, runner.log)
        summarise(recipe, plan, run_dir)
        write_report(run_dir)
    world.barrier()
    return run_dir


def _note_recipe(recipe: AnyRecipe, run_dir: Path, log: Callable[[str], None]) -> None:
    make_way(run_dir / "recipe.yaml", run_dir, log)
    atomic_write(run_dir / "recipe.yaml", recipes.dump(recipe, comments=True))


def is_finished(recipe: AnyRecipe, plan: Plan) -> bool:
    """Whether every stage of the plan is done in the recipe's run folder."""
    return all(row.state == "done" for row in runner_of(recipe, plan).status())


def summarise(recipe: AnyRecipe, plan: Plan, run_dir: Path) -> None:
    """Write `summary.json` from the committed evaluations."""
    folder = RunReader(run_dir)
    found = {evaluation.folder.name: evaluation.metrics() for evaluation in folder.all_evaluations}
    histories: dict[str, dict[str, AgentHistory]] = {}
    for point in plan.points:
        agents = histories.setdefault(point.arm, {})
        metrics = {k: v for k, v in found[point.evaluation].items() if k not in ("role", "iteration")}
        agents.setdefault(point.agent, AgentHistory(point.role)).add(point.iteration, metrics)
    arms = {arm: agents for arm, agents in histories.items() if arm}
    stages = [
        {"name": stage.name, "seconds": timing.get("seconds", 0.0), "tokens": timing.get("tokens", 0)}
        for stage in folder.stages
        if (timing := folder.timing(stage)) is not None
    ]
    models = {agent.name: agent.source for agent in recipe.agents}
    versions = {"macpo": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers", "peft")}
    extra: dict[str, Any] = {
        "evaluations": [
            {"arm": point.arm, "agent": point.agent, "iteration": point.iteration, "stage": point.evaluation}
            for point in plan.points
        ]
    }
    if plan.development:
        extra["development"] = folder.development
    if not isinstance(recipe, Recipe):
        extra["title"] = f"{TITLES[recipe.recipe]}: {run_dir.resolve().name}"
    summary = build_summary(histories[""], stages, recipe.seed, versions, arms=arms, models=models, **extra)
    write_json(run_dir / "summary.json", folder.with_gaps(summary))


def show(run_dir: Path, write: Callable[[str], None] = print) -> None:
    """The table of every agent's score by iteration, and where the report is."""
    write(table(RunReader(run_dir).summary))
    write(f"\nreport: {run_dir / 'report.html'}")
