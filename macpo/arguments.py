"""What the `macpo` command takes on its command line."""

from __future__ import annotations

import argparse

from macpo import __version__
from macpo.engine.paths import argument as path_argument


def parser() -> argparse.ArgumentParser:
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
    demo.set_defaults(command="demo")

    init = commands.add_parser("init", parents=[common], help="write a commented recipe to start from")
    init.add_argument("path", type=path_argument, help="file to write")
    init.add_argument("--like", default="hh-local", help="which recipe (default: hh-local); --like list names them")
    init.set_defaults(command="init")

    check = commands.add_parser("check", parents=[recipe], help="check config, data, tokenizers and templates")
    check.add_argument("--examples", type=int, default=2, help="pairs to show with prompt and response tokens marked")
    check.set_defaults(command="check")

    plan = commands.add_parser(
        "plan", parents=[common], help="a recipe's stages with memory, time and disk; or which settings fit some GPUs"
    )
    plan.add_argument("recipe", type=path_argument, nargs="?", help="recipe (YAML), or the folder of a run")
    _overrides(plan)
    _fitting(plan)
    plan.set_defaults(command="plan")

    run = commands.add_parser("run", parents=[recipe, reruns], help="run a recipe, or go on with it")
    run.add_argument("--ranks", type=int, default=1, help="processes that share every stage: this machine's GPUs")
    run.add_argument("--seeds", metavar="A-B", help="several seeds in OUTPUT-seeds/seed-N, and every claim over them")
    run.set_defaults(command="run")

    reward = commands.add_parser("train-reward", parents=[recipe, reruns], help="run a recipe of a reward model")
    reward.add_argument("--ranks", type=int, default=1, help="processes that share every stage: this machine's GPUs")
    reward.set_defaults(command="train-reward", seeds=None)

    compare = commands.add_parser("compare", parents=[recipe], help="a recipe's method beside its baselines")
    compare.add_argument("--methods", default="all", help="baselines, separated by commas (default: all)")
    compare.add_argument("--seeds", default="0", metavar="A-B", help="seeds, such as 0-4 or 1,5,9 (default: 0)")
    compare.add_argument("--k-curve", default="", metavar="A-B", help="also with fewer teachers, such as 1-5")
    compare.add_argument(
        "--k-orders", type=int, metavar="N", help="with N choices of each number (default: one from each teacher)"
    )
    compare.add_argument("--ablations", choices=("none", "paper"), default="none", help="also without each part")
    compare.add_argument("--match", choices=("none", "steps"), default="none", help="limit the baselines' rounds")
    compare.add_argument("--plan", action="store_true", help="print stages, tokens, steps and time; run nothing")
    compare.add_argument(
        "--calibrate", action="store_true", help="for --plan: measure this machine with the recipe's own models"
    )
    compare.add_argument("--rerun-stale", action="store_true", help="run stages again whose inputs or settings changed")
    compare.set_defaults(command="compare")

    status = commands.add_parser("status", parents=[recipe], help="each stage: done, running, stale (why) or pending")
    status.set_defaults(command="status")

    report = commands.add_parser("report", parents=[common], help="write a run's report.html again")
    report.add_argument("run", type=path_argument, help="folder of the run")
    report.add_argument("--out", type=path_argument, help="file to write (default: report.html in the run's folder)")
    report.set_defaults(command="report")

    evaluate = commands.add_parser("evaluate", parents=[common], help="a language model compares the run's answers")
    _judging(evaluate)
    evaluate.set_defaults(command="evaluate")

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
    export.set_defaults(command="export")

    annotate = commands.add_parser("annotate", parents=[common], help="people judge pairs of a run's answers, blind")
    _annotating(annotate)
    annotate.set_defaults(command="annotate")
    return root


def _judging(evaluate: argparse.ArgumentParser) -> None:
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
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine: a GPU by one step, a CPU by the recipe's own models",
    )
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
