"""The `macpo` command: `macpo COMMAND --help` says what each does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from macpo import __version__
from macpo.engine.errors import Stopped
from macpo.engine.processes import Terminated, ended_by_sigterm

COMMANDS = (
    *("demo", "init", "check", "plan", "run", "train-reward", "compare"),
    *("status", "report", "evaluate", "export", "annotate"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, and exit with the exit code (0, 2 config, 3 data, 4 resources, 5 integrity, …)."""
    with ended_by_sigterm():
        try:
            from macpo.engine.console import run_cli  # from here on, what takes longer to import

            arguments = parser().parse_args(argv)
            code = run_cli(lambda: arguments.command(arguments), debug=arguments.debug)
        except (KeyboardInterrupt, Terminated):  # before the command or after it
            print(Stopped("stopped by a signal", "run the same command again").problems[0], file=sys.stderr)
            code = Stopped.code
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    from macpo.engine.paths import argument as path_argument

    root = argparse.ArgumentParser(prog="macpo", description="Weak-to-strong alignment by MACPO (arXiv 2410.07672).")
    root.add_argument("--version", action="version", version=f"macpo {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    recipe = argparse.ArgumentParser(add_help=False, parents=[common])
    recipe.add_argument("recipe", type=path_argument, help="recipe (YAML), or the folder of a run")
    _overrides(recipe)
    reruns = argparse.ArgumentParser(add_help=False)
    reruns.add_argument("--rerun-stale", action="store_true", help="run stages again whose settings have changed")
    reruns.add_argument("--from", dest="from_stage", metavar="STAGE", help="run this stage and all after it again")

    demo = commands.add_parser("demo", parents=[common, reruns], help="the whole method offline in the demo world")
    demo.add_argument("--seeds", metavar="A-B", help="several seeds with baselines and ablations, and every claim")
    demo.add_argument("--out", type=path_argument, help="folder of the run (default: runs/demo, runs/demo-seeds)")
    _overrides(demo)
    demo.set_defaults(command=_demo)

    init = commands.add_parser("init", parents=[common], help="write a commented recipe to start from")
    init.add_argument("path", type=path_argument, help="file to write")
    init.add_argument("--like", default="hh-local", help="which recipe (default: hh-local); --like list names them")
    init.set_defaults(command=_init)

    check = commands.add_parser("check", parents=[recipe], help="check config, data, tokenizers and templates")
    check.add_argument("--examples", type=int, default=2, help="pairs to show with prompt and response tokens marked")
    check.set_defaults(command=_check)

    plan = commands.add_parser(
        "plan", parents=[common], help="a recipe's stages with memory, time and disk; or which settings fit some GPUs"
    )
    plan.add_argument("recipe", type=path_argument, nargs="?", help="recipe (YAML), or the folder of a run")
    _overrides(plan)
    _fitting(plan)
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[recipe, reruns], help="run a recipe, or go on with it")
    run.add_argument("--ranks", type=int, default=1, help="processes that share every stage: this machine's GPUs")
    run.add_argument("--seeds", metavar="A-B", help="several seeds in OUTPUT-seeds/seed-N, and every claim over them")
    run.set_defaults(command=_run)

    reward = commands.add_parser("train-reward", parents=[recipe, reruns], help="run a recipe of a reward model")
    reward.add_argument("--ranks", type=int, default=1, help="processes that share every stage: this machine's GPUs")
    reward.set_defaults(command=_train_reward, seeds=None)

    compare = commands.add_parser("compare", parents=[recipe], help="a recipe's method beside its baselines")
    compare.add_argument("--methods", default="all", help="baselines, separated by commas (default: all)")
    compare.add_argument("--seeds", default="0", metavar="A-B", help="seeds, such as 0-4 or 1,5,9 (default: 0)")
    compare.add_argument("--k-curve", default="", metavar="A-B", help="also with fewer teachers, such as 1-5")
    compare.add_argument("--ablations", choices=("none", "paper"), default="none", help="also without each part")
    compare.add_argument("--match", choices=("none", "steps"), default="none", help="limit the baselines' rounds")
    compare.add_argument("--plan", action="store_true", help="print stages, tokens, steps and time; run nothing")
    compare.add_argument("--calibrate", action="store_true", help="measure one step for --plan")
    compare.add_argument("--rerun-stale", action="store_true", help="run stages again whose inputs or settings changed")
    compare.set_defaults(command=_compare)

    status = commands.add_parser("status", parents=[recipe], help="each stage: done, running, stale (why) or pending")
    status.set_defaults(command=_status)

    report = commands.add_parser("report", parents=[common], help="write a run's report.html again")
    report.add_argument("run", type=path_argument, help="folder of the run")
    report.add_argument("--out", type=path_argument, help="file to write (default: report.html in the run's folder)")
    report.set_defaults(command=_report)

    evaluate = commands.add_parser("evaluate", parents=[common], help="a language model compares the run's answers")
    _judging(evaluate)
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser("export", parents=[common], help="a policy as a Hugging Face or peft folder")
    export.add_argument("run", type=path_argument, help="folder of the run")
    export.add_argument("--out", type=path_argument, required=True, help="folder to make")
    export.add_argument("--agent", default="", help="the student's (default), a teacher's name, or ceiling")
    export.add_argument("--iteration", type=int, default=-1, help="-1 is the last (default)")
    export.add_argument("--policy", choices=("positive", "negative"), default="positive")
    export.add_argument("--merge", action="store_true", help="merge an adapter into its base (in float32)")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: a model's as its base is stored, an adapter's as trained)",
    )
    export.add_argument("--arm", default="", help="an ablation arm's policy instead of the main run's")
    export.set_defaults(command=_export)

    annotate = commands.add_parser("annotate", parents=[common], help="people judge pairs of a run's answers, blind")
    _annotating(annotate)
    annotate.set_defaults(command=_annotate)
    return root


def _judging(evaluate: argparse.ArgumentParser) -> None:
    from macpo.engine.paths import argument as path_argument

    evaluate.add_argument("run", type=path_argument, help="folder of the run")
    evaluate.add_argument("--judge", required=True, metavar="NAME", help="one of the recipe's evaluation.judges")
    evaluate.add_argument("--judges", type=path_argument, metavar="FILE", help="file of judges instead of the recipe's")
    evaluate.add_argument("--policy", metavar="NAME@ITERATION", help="who is judged (default: the student's last)")
    evaluate.add_argument("--opponents", metavar="A,B", help="against whom (default: evaluation.opponents)")
    evaluate.add_argument("--limit", type=_positive, help="judge only so many test prompts")
    evaluate.add_argument("--validate", action="store_true", help="judge the human test pairs instead")
    evaluate.add_argument("--plan", action="store_true", help="print what it will ask and cost, and stop")
    evaluate.add_argument("--price-in", type=float, metavar="X", help="price of a million tokens that are sent")
    evaluate.add_argument("--price-out", type=float, metavar="X", help="price of a million tokens that come back")
    evaluate.add_argument("--ranks", type=_positive, default=1, help="processes that share a local judge's questions")


def _annotating(annotate: argparse.ArgumentParser) -> None:
    from macpo.engine.paths import argument as path_argument

    annotate.add_argument("run", type=path_argument, help="folder of the run")
    annotate.add_argument("--annotator", metavar="NAME", help="who judges (default: the account's name)")
    annotate.add_argument("--port", type=int, help="of the page, on this machine alone (default: a free one)")
    annotate.add_argument("--pairs", metavar="A:B,…", help="policies (default: the student's last and first)")
    annotate.add_argument("--prompts", type=int, help="test prompts to judge each pair on (default 100)")
    annotate.add_argument("--annotators", type=int, help="people who will judge (default 3)")
    annotate.add_argument("--overlap", type=float, help="share of the people who judge each item (default 1)")
    annotate.add_argument("--repeats", type=float, help="share shown again with sides swapped (default 0.1)")
    annotate.add_argument(
        "--gold-checks", type=float, nargs="?", const=0.05, help="also human pairs, as a share (default 0; alone 0.05)"
    )
    annotate.add_argument("--seed", type=int, help="of prompts, order and sides (default 0)")
    instead = annotate.add_mutually_exclusive_group()
    instead.add_argument("--report", action="store_true", help="no page: count all judgements, with agreement")
    instead.add_argument(
        "--export", dest="export_to", nargs=2, metavar=("FORMAT", "FILE"), help="label-studio, argilla"
    )
    instead.add_argument("--import", dest="import_from", metavar="FILE", help="Label Studio's JSON export")


def _fitting(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--model", metavar="SHAPE|FOLDER", help="no recipe: llama-3-8b and the like, or a folder")
    plan.add_argument("--table", action="store_true", help="no recipe: a 70B student, 8B teachers; 1, 2 and 8 nodes")
    plan.add_argument("--gpu", help="h100, h200, a100 or b200 (default h100; of a recipe: this machine)")
    plan.add_argument("--gpus", type=_positive, help="ranks that share a stage (default 8; of a recipe: 1)")
    plan.add_argument("--calibrate", action="store_true", help="measure one step on this machine and scale by it")
    plan.add_argument("--tuning", choices=("lora", "full"), help="with --model (default lora)")
    for name, what in (
        ("--pairs", "of a step over all GPUs (default 128)"),
        ("--prompt-tokens", "mean of a prompt (default 200)"),
        ("--response-tokens", "mean of an answer (default 80)"),
        ("--microbatch-tokens", "of a packed row (default 8192)"),
    ):
        plan.add_argument(name, type=_positive, help=f"with --model or --table: {what}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    command.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")


def _demo(arguments: argparse.Namespace) -> None:
    from macpo.commands.demo import demo_recipe
    from macpo.commands.run import run, show
    from macpo.commands.seeds import parse_seeds, run_seeds

    overrides = list(arguments.overrides)
    if arguments.out and not arguments.seeds:
        overrides.append(f"output={str(arguments.out)!r}")
    if _printed(arguments, demo_recipe(overrides, ablations=bool(arguments.seeds))):
        return

    def run_one(further: Sequence[str] = ()) -> Path:
        recipe = demo_recipe([*overrides, *further], ablations=bool(arguments.seeds))
        return run(recipe, rerun_stale=arguments.rerun_stale, from_stage=arguments.from_stage)

    if arguments.seeds:
        run_seeds(parse_seeds(arguments.seeds), arguments.out or Path("runs/demo-seeds"), run_one)
        return
    show(run_one())


def _init(arguments: argparse.Namespace) -> None:
    from macpo.commands.demo import copy_recipe

    print(copy_recipe(arguments.like, arguments.path))


def _check(arguments: argparse.Namespace) -> None:
    from macpo.commands.check import check
    from macpo.engine.console import say
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return
    for line in check(recipe, arguments.examples):
        say(line, error=False)


def _plan(arguments: argparse.Namespace) -> None:
    from macpo.commands import plan, plan_model
    from macpo.commands.estimates import hardware_of
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
    from macpo.engine.distributed.launcher import launch
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if _printed(arguments, recipe):
        return

    def run_one(further: Sequence[str] = ()) -> None:
        overrides = [*arguments.overrides, *further]
        if arguments.ranks == 1:
            again = load(arguments.recipe, overrides)
            run(again, rerun_stale=arguments.rerun_stale, from_stage=arguments.from_stage)
            return
        words = [str(arguments.recipe), *(f"--set={override}" for override in overrides)]
        words += [f"--from={arguments.from_stage}"] if arguments.from_stage else []
        words += [flag for flag in ("--rerun-stale", "--debug") if getattr(arguments, flag[2:].replace("-", "_"))]
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
    from macpo.commands.estimates import hardware_of
    from macpo.commands.seeds import parse_seeds
    from macpo.config import Recipe
    from macpo.engine.errors import ConfigError
    from macpo.recipe_kinds import load

    recipe = load(arguments.recipe, arguments.overrides)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"the recipe's kind is {recipe.recipe}", "give one of recipe: macpo", field="recipe")
    comparison = comparison_of(
        recipe,
        parse_seeds(arguments.seeds),
        methods=None if arguments.methods == "all" else arguments.methods.split(","),
        k_curve=parse_seeds(arguments.k_curve) if arguments.k_curve else (),
        ablations=arguments.ablations == "paper",
        match_steps=arguments.match == "steps",
    )
    if _printed(arguments, comparison.recipe):
        return
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
    from macpo.engine.errors import ConfigError

    for name in ("policy", "opponents"):
        if arguments.validate and getattr(arguments, name):
            raise ConfigError("human pairs have no policies", f"leave out --{name}", field="--validate")
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


def _printed(arguments: argparse.Namespace, recipe: object) -> bool:
    """Print the resolved recipe as YAML where `--print-config` asks for it; return whether it did."""
    if not arguments.print_config:
        return False
    from pydantic import BaseModel

    from macpo.engine.recipe import dump

    assert isinstance(recipe, BaseModel)
    print(dump(recipe, comments=True))
    return True


if __name__ == "__main__":
    main()
