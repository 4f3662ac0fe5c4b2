"""The `macpo` command: `macpo COMMAND --help` says what each does."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from macpo.engine.errors import Stopped
from macpo.engine.processes import Terminated, ended_by_sigterm, forget_ctrl_c

if TYPE_CHECKING:
    from macpo.engine.run.run_progress import Part


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, and exit with the exit code (0, 2 config, 3 data, 4 resources, 5 integrity, …)."""
    with ended_by_sigterm():
        try:
            with ended_by_sigterm():  # whatever error a stop has become leaves it as the stop
                from macpo.arguments import parse  # from here on, what takes longer to import
                from macpo.engine.console import run_cli

                arguments = parse(argv)
                code = run_cli(lambda: COMMANDS[arguments.command](arguments), debug=arguments.debug)
        except (Terminated, KeyboardInterrupt):  # before the command or after it
            forget_ctrl_c()
            print(Stopped("stopped by a signal", "run the same command again").problems[0], file=sys.stderr)
            code = Stopped.code
    sys.exit(code)


def _demo(arguments: argparse.Namespace) -> None:
    from macpo.commands.demo import demo_recipe
    from macpo.commands.run import run, show
    from macpo.commands.seeds import parse_seeds, run_seeds

    overrides = list(arguments.overrides)
    if arguments.out and not arguments.seeds:
        overrides.append(f"output={json.dumps(str(arguments.out))}")
    if _printed(arguments, demo_recipe(overrides, ablations=bool(arguments.seeds))):
        return

    def run_one(further: Sequence[str] = (), part: Part | None = None) -> Path:
        recipe = demo_recipe([*overrides, *further], ablations=bool(arguments.seeds))
        return run(recipe, rerun_stale=arguments.rerun_stale, from_stage=arguments.from_stage, part=part)

    if arguments.seeds:
        run_seeds(parse_seeds(arguments.seeds), arguments.out or Path("runs/demo-seeds"), run_one)
        return
    show(run_one())


def _init(arguments: argparse.Namespace) -> None:
    from macpo.commands.demo import copy_recipe

    print(copy_recipe(arguments.like, arguments.path))


def _check(arguments: argparse.Namespace) -> None:
    from macpo.engine.console import say
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return
    from macpo.commands.check import check

    for line in check(recipe, arguments.examples):
        say(line, error=False)


def _plan(arguments: argparse.Namespace) -> None:
    from macpo.commands.planning import plan, plan_model
    from macpo.commands.planning.estimates import hardware_of
    from macpo.commands.preflight import preflight
    from macpo.engine.errors import ConfigError
    from macpo.recipe_kinds import load, plan_of

    if arguments.recipe is None:
        print(plan_model.show(arguments))
        return
    odd = [name for name in plan_model.WITHOUT_RECIPE if getattr(arguments, name)]
    if odd:
        raise ConfigError(f"--{odd[0].replace('_', '-')} does not go with a recipe", "leave out one of them")
    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return
    planned = plan_model.gpu_of(arguments.gpu) if arguments.gpu else None
    preflight(recipe, plan_of(recipe, must_exist=False), ranks=arguments.gpus or 1, gpu=planned)
    print(plan.show(recipe, hardware_of(recipe, arguments.gpu, arguments.gpus, arguments.calibrate)))


def _run(arguments: argparse.Namespace) -> None:
    from macpo.commands.run import run, show
    from macpo.commands.seeds import check_kind, parse_seeds, run_seeds
    from macpo.engine.console import say
    from macpo.engine.distributed.launcher import launch
    from macpo.engine.run.attempts import COMMAND, typed
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return

    def run_one(further: Sequence[str] = (), part: Part | None = None) -> None:
        overrides = [*arguments.overrides, *further]
        if arguments.ranks == 1:
            again = load(arguments.recipe, overrides)
            run(again, rerun_stale=arguments.rerun_stale, from_stage=arguments.from_stage, part=part)
            return
        if part is not None:
            say(f"{part.label} ({part.number} of {part.of})")
        words = [str(arguments.recipe), *(f"--set={override}" for override in overrides)]
        words += [f"--from={arguments.from_stage}"] if arguments.from_stage else []
        words += [flag for flag in ("--rerun-stale", "--debug") if getattr(arguments, flag[2:].replace("-", "_"))]
        os.environ[COMMAND] = typed()
        launch([sys.executable, "-m", "macpo.engine.train", *words], arguments.ranks)

    if arguments.seeds:
        check_kind(recipe)
        run_seeds(parse_seeds(arguments.seeds), Path(f"{recipe.output}-seeds"), run_one)
        return
    run_one()
    show(Path(recipe.output))


def _train_reward(arguments: argparse.Namespace) -> None:
    from macpo.commands.run import require_kind

    require_kind(arguments.recipe, "reward")
    _run(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from macpo.commands.compare import compare, comparison_of, planned
    from macpo.commands.planning.estimates import hardware_of
    from macpo.commands.seeds import parse_seeds
    from macpo.config import Recipe
    from macpo.engine.errors import ConfigError
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"the recipe's kind is {recipe.recipe}", "give one of recipe: macpo", field="recipe")
    comparison = comparison_of(
        recipe,
        parse_seeds(arguments.seeds) if arguments.seeds else [recipe.seed],
        methods=None if arguments.methods == "all" else arguments.methods.split(","),
        k_curve=parse_seeds(arguments.k_curve) if arguments.k_curve else (),
        k_orders=arguments.k_orders,
        ablations=arguments.ablations == "paper",
        match_steps=arguments.match == "steps",
    )
    if _printed(arguments, comparison.recipe):
        return
    if arguments.calibrate and not arguments.plan:
        raise ConfigError("it is for --plan", "add --plan, or leave it out", field="--calibrate")
    if arguments.plan:
        print(planned(comparison, hardware_of(recipe, measure=True) if arguments.calibrate else None))
        return
    compare(comparison, rerun_stale=arguments.rerun_stale)


def _status(arguments: argparse.Namespace) -> None:
    from macpo.commands.run import runner_of
    from macpo.engine.console import say
    from macpo.recipe_kinds import load, plan_of

    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return
    plan = plan_of(recipe, must_exist=False)
    for row in runner_of(recipe, plan).status():
        seconds = f"{row.seconds:8.1f} s" if row.seconds is not None else " " * 10
        say(f"{row.state:8} {seconds}  {row.name}" + (f"  ({row.why})" if row.why else ""), error=False)
    for path in plan.identities.unknown:
        say(f"note: {path} is not here; finished stages count as made from it")


def _report(arguments: argparse.Namespace) -> None:
    from macpo.recipe_kinds import load, plan_of
    from macpo.report.findings import table
    from macpo.report.page import write_report
    from macpo.report.run_reader import RunReader

    stages = plan_of(load(arguments.run), must_exist=False).graph.stages
    print(table(RunReader(arguments.run).summary), end="\n\n")
    print(f"report: {write_report(arguments.run, planned=[stage.name for stage in stages], out=arguments.out)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from macpo.commands.evaluate import Wishes, evaluate

    evaluate(
        Wishes(
            run=str(arguments.run),
            judge=arguments.judge,
            judges=str(arguments.judges) if arguments.judges else None,
            policy=arguments.policy,
            opponents=tuple(filter(None, (arguments.opponents or "").split(","))),
            limit=arguments.limit,
            validate=arguments.validate,
            plan=arguments.plan,
            price_in=arguments.price_in,
            price_out=arguments.price_out,
            ranks=arguments.ranks,
            debug=arguments.debug,
        )
    )


def _export(arguments: argparse.Namespace) -> None:
    from macpo.commands.export import Choice, export
    from macpo.recipe_kinds import load

    choice = Choice(
        agent=arguments.agent,
        iteration=arguments.iteration,
        policy=arguments.policy,
        arm=arguments.arm,
        merge=arguments.merge,
        dtype=arguments.dtype,
    )
    out, base = export(arguments.run, load(arguments.run), arguments.out, choice)
    print(f"exported: {out}")
    if base is not None and Path(base).is_absolute():
        print(f"an adapter of {base}, which has to stay there; --merge makes a model that needs no other")


def _annotate(arguments: argparse.Namespace) -> None:
    from macpo.commands.annotate import annotate

    annotate(arguments)


def _chat(arguments: argparse.Namespace) -> None:
    from macpo.commands.chat import chat

    chat(arguments)


def _schema(arguments: argparse.Namespace) -> None:
    if arguments.markdown is not None:
        from macpo.commands.tooling.reference import write_pages

        print("\n".join(f"wrote {path}" for path in write_pages(arguments.markdown)))
        return
    from macpo.commands.tooling.schema import schema

    print(schema(), end="")


def _env(arguments: argparse.Namespace) -> None:
    from macpo.commands.tooling.env import lines
    from macpo.engine.console import say

    for line in lines():
        say(line, error=False)


def _completion(arguments: argparse.Namespace) -> None:
    from macpo.arguments import parser
    from macpo.commands.tooling.completion import script

    print(script(parser(), arguments.shell))


def _printed(arguments: argparse.Namespace, recipe: object) -> bool:
    """Print the resolved recipe as YAML where `--print-config` asks for it; return whether it did."""
    if not arguments.print_config:
        return False
    from pydantic import BaseModel

    from macpo.engine.recipe import dump

    assert isinstance(recipe, BaseModel)
    print(dump(recipe, comments=True))
    return True


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "init": _init,
    "check": _check,
    "plan": _plan,
    "run": _run,
    "train-reward": _train_reward,
    "compare": _compare,
    "status": _status,
    "report": _report,
    "evaluate": _evaluate,
    "export": _export,
    "annotate": _annotate,
    "chat": _chat,
    "schema": _schema,
    "env": _env,
    "completion": _completion,
}

if __name__ == "__main__":
    main()
