"""From a recipe to a finished run: stages, then summary.json, table and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.commands.provenance import about, versions
from macpo.commands.scored import judged_by, scored
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.distributed.agree import is_main, on_main
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.files import atomic_write, write_json
from macpo.engine.processes import set_threads
from macpo.engine.removal import make_way
from macpo.engine.run.attempts import attempting
from macpo.engine.run.folder import RunFolder
from macpo.engine.run.lock import refuse_held
from macpo.engine.run.run_progress import Part
from macpo.engine.run.runner import Runner
from macpo.engine.run.workers import Workers
from macpo.evaluation.summary import AgentHistory, build_summary
from macpo.method.run_plan import Plan
from macpo.recipe_kinds import AnyRecipe, load, plan_of
from macpo.report.findings import table
from macpo.report.run_reader import RunReader
from macpo.report.titles import title_of

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World

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
    try:
        recipe = load(path, overrides)
    except MacpoError as error:
        error.relayed = not is_main(world)  # every rank finds it, one says it
        raise
    return run(recipe, world=world, rerun_stale=rerun_stale, from_stage=from_stage)


def require_kind(path: Path, kind: str) -> None:
    """Raise ConfigError for a recipe of another kind; one that cannot be read is left to `load`."""
    file = path / "recipe.yaml" if path.is_dir() else path
    found, line = recipes.kind_of(file) if file.exists() else (kind, None)
    if found != kind:
        problem = f"a recipe of kind {found or 'macpo'!r}, where {kind!r} is asked for"
        fix = f"use macpo run, which takes any, or begin with macpo init FILE --like {kind}"
        raise ConfigError(problem, fix, file=file, line=line, field="recipe")


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
    recipe: AnyRecipe,
    *,
    world: World | None = None,
    rerun_stale: bool = False,
    from_stage: str | None = None,
    part: Part | None = None,
) -> Path:
    """Run every stage that is not done, then write summary and report; returns the run's folder.

    `part`: its place among several runs, for who watches.
    Raises MacpoError with its exit code; the same call resumes a stopped run.
    """
    set_threads(recipe.compute.threads)
    run_dir = Path(recipe.output)
    plan = plan_of(recipe, must_exist=False)
    finished = from_stage is None and on_main(world, lambda: is_finished(recipe, plan))
    if not finished:  # a finished run needs neither its data nor its models
        on_main(world, lambda: refuse_held(run_dir))  # before whatever takes seconds to import
        from macpo.commands.check import check_templates
        from macpo.commands.preflight import preflight

        on_main(world, lambda: preflight(recipe, plan, ranks=1 if world is None else world.size))
        if RunFolder(run_dir).committed("data") is None:
            on_main(world, lambda: check_templates(recipe))
        plan = plan_of(recipe) if plan.identities.unknown else plan
    runner = runner_of(recipe, plan, world=world, rerun_stale=rerun_stale, from_stage=from_stage)
    runner.part = part
    if not finished and is_main(world):
        from macpo.commands.planning.estimates import durations

        runner.planned = durations(recipe, plan)
    with attempting(run_dir, lambda: about(recipe, plan, world), runner.log) as begin:

        def began() -> None:
            _note_recipe(recipe, run_dir, runner.log)
            if not finished:
                begin()

        runner.began = began
        runner.run()
    if is_main(world):
        from macpo.report.page import write_report

        for name in ("summary.json", "report.html"):
            make_way(run_dir / name, run_dir, runner.log)
        summarise(recipe, plan, run_dir)
        write_report(run_dir)
    if world is not None:
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
        metrics |= scored(plan, folder, point.evaluation)
        agents.setdefault(point.agent, AgentHistory(point.role)).add(point.iteration, metrics)
    arms = {arm: agents for arm, agents in histories.items() if arm}
    stages = [
        {"name": stage.name, "seconds": timing.get("seconds", 0.0), "tokens": timing.get("tokens", 0)}
        for stage in folder.stages
        if (timing := folder.timing(stage)) is not None
    ]
    models = {agent.name: agent.source for agent in recipe.agents}
    extra: dict[str, Any] = judged_by(recipe, plan, folder)
    extra["evaluations"] = [
        {"arm": point.arm, "agent": point.agent, "iteration": point.iteration, "stage": point.evaluation}
        for point in plan.points
    ]
    if plan.development:
        extra["development"] = {
            teacher: folder.development[teacher] | scored(plan, folder, stage)
            for teacher, stage in plan.development.items()
        }
    if not isinstance(recipe, Recipe):
        extra["title"] = title_of(recipe.recipe, run_dir.resolve().name)
    summary = build_summary(histories[""], stages, recipe.seed, versions(), arms=arms, models=models, **extra)
    write_json(run_dir / "summary.json", folder.with_gaps(summary))


def show(run_dir: Path, write: Callable[[str], None] = print) -> None:
    """The table of every agent's score by iteration, and where the report is."""
    summary = RunReader(run_dir).summary
    write(table(summary))
    for warning in summary.get("warnings", ()):
        write(f"\n{warning}")
    write(f"\nreport: {run_dir / 'report.html'}")
