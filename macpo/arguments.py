"""What the `macpo` command takes on its command line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from macpo import __version__, bundled
from macpo.engine.paths import argument as path_argument

APART = {
    "print_config": ("rerun_stale", "from_stage", "ranks", "examples", "plan", "calibrate", "gpu", "gpus"),
    "plan": ("rerun_stale",),
    "validate": ("policy", "opponents"),
}
"""Options that make a command do something else -> options that would then be ignored."""
OVERRIDDEN = {"seed": "seed", "seeds": "seed", "out": "output"}
"""Options that stand for a field of the recipe."""


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone, and says what is wrong in one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str, fix: str = "") -> NoReturn:
        message = message.replace("invalid int value", "no whole number").replace("invalid float value", "no number")
        if choice := re.fullmatch(r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL):
            known = re.findall(r"[\w-]+", choice[3])
            message, near = f"{choice[1]}: got {choice[2]!r}", difflib.get_close_matches(choice[2], known, 1)
            fix = f"did you mean {near[0]}" if near else f"use {', '.join(known)}"
        self.exit(2, f"error: {self.prog}: {message}. Fix: {fix or f'see {self.prog} --help'}.\n")

    def given(self, found: argparse.Namespace, name: str) -> bool:
        """Whether an option has another value than its default; False for one that the command does not have."""
        return getattr(found, name, None) != self.get_default(name)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; one that is wrong, or would be ignored in part, ends the process with exit code 2."""
    root = parser()
    found, unknown = root.parse_known_args(argv)
    command: Parser = found.parser
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, command._option_string_actions, 1) if word.startswith("-") else []
        what = "option" if word.startswith("-") else "word"
        command.error(f"unknown {what} {word}", f"did you mean {near[0]}" if near else "")
    _refuse_what_is_ignored(command, found)
    if found.command == "demo" and found.seed is not None:
        found.out = found.out or Path(f"runs/demo-seed-{found.seed}")
    if getattr(found, "seed", None) is not None and "overrides" in found:
        found.overrides = [*found.overrides, f"seed={found.seed}"]
    return found


def _refuse_what_is_ignored(command: Parser, found: argparse.Namespace) -> None:
    for mode, others in APART.items():
        for other in others:
            if command.given(found, mode) and command.given(found, other):
                command.error(f"{_option(other)} does not go with {_option(mode)}", "leave one of them out")
    fields = {each.partition("=")[0].strip() for each in getattr(found, "overrides", ())}
    for name, field in OVERRIDDEN.items():
        if field in fields and command.given(found, name):
            command.error(f"--set {field} does not go with {_option(name)}", "leave one of them out")
    if found.command == "demo" and found.seeds and "output" in fields:
        command.error("--set output does not go with --seeds", "name the folder of all seeds with --out")
    if found.command == "init" and (found.path is None) != (found.like == "list"):
        command.error(*_INIT[found.path is None])
    if found.command in ("export", "chat") and found.policy == "negative" and command.given(found, "iteration"):
        command.error("--iteration does not go with --policy negative: an agent has one", "leave one of them out")


_INIT = {
    True: ("no file to write", "macpo init mine.yaml, or --like list for the recipes' names"),
    False: ("--like list writes no file", "leave the file out, or name a recipe"),
}


def _option(name: str) -> str:
    return "--from" if name == "from_stage" else "--" + name.replace("_", "-")


def recipe_argument(text: str) -> Path:
    """A recipe's file, the folder of a run, or the name of a recipe that comes with the package."""
    return bundled.located(path_argument(text))


def parser() -> Parser:
    root = Parser(prog="macpo", description="Weak-to-strong alignment by MACPO (arXiv 2410.07672).")
    root.add_argument("--version", action="version", version=f"macpo {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    recipe = Parser(add_help=False, parents=[common])
    recipe.add_argument(
        "recipe",
        type=recipe_argument,
        help="recipe (YAML), the name of one that comes along (macpo init --like list), or the folder of a run",
    )
    _overrides(recipe)
    reruns = Parser(add_help=False)
    reruns.add_argument("--rerun-stale", action="store_true", help="run stages again whose settings have changed")
    reruns.add_argument("--from", dest="from_stage", metavar="STAGE", help="run this stage and all after it again")
    run_folder = Parser(add_help=False, parents=[common])
    run_folder.add_argument("run", type=path_argument, help="folder of the run")

    def add(name: str, *parents: Parser, help: str) -> Parser:
        made = commands.add_parser(name, parents=parents or [common], help=help, description=help)
        made.set_defaults(command=name, parser=made)
        return made

    demo = add("demo", common, reruns, help="the whole method offline in the demo world")
    _seeds(demo, "several seeds with baselines and ablations, and every claim")
    demo.add_argument(
        "--out",
        type=path_argument,
        help="folder of the run (default: runs/demo, with --seed runs/demo-seed-N, with --seeds runs/demo-seeds)",
    )
    _overrides(demo)

    init = add("init", help="write a commented recipe to start from")
    init.add_argument("path", type=path_argument, nargs="?", help="file to write, or a folder for it; both may be new")
    init.add_argument("--like", default="hh-local", help="which recipe (default: hh-local); --like list names them")

    check = add("check", recipe, help="check config, data, tokenizers and templates")
    check.add_argument("--examples", type=_whole, default=2, help="pairs to show with their tokens marked")

    plan = add("plan", help="a recipe's stages with memory, time and disk; or which settings fit some GPUs")
    plan.add_argument("recipe", type=recipe_argument, nargs="?", help="recipe (YAML), or the folder of a run")
    _overrides(plan)
    _fitting(plan)

    run = add("run", recipe, reruns, help="run a recipe, or go on with it")
    run.add_argument("--ranks", type=_positive, default=1, help="processes that share every stage: this machine's GPUs")
    _seeds(run, "several seeds in OUTPUT-seeds/seed-N, and every claim over them")

    reward = add("train-reward", recipe, reruns, help="run a recipe of a reward model")
    reward.add_argument("--ranks", type=_positive, default=1, help="processes that share every stage")
    reward.add_argument("--seed", type=_whole, metavar="N", help="another seed, as --set seed=N")
    reward.set_defaults(seeds=None)

    _comparing(add("compare", recipe, help="a recipe's method beside its baselines"))
    add("status", recipe, help="each stage: done, running, stale (why) or pending")

    report = add("report", run_folder, help="write a run's report.html again")
    report.add_argument("--out", type=path_argument, help="file to write (default: report.html in the run's folder)")

    _judging(add("evaluate", run_folder, help="a language model compares the run's responses"))

    chat = add("chat", run_folder, help="talk to a policy of a run, or to two at once")
    _policy(chat)
    chat.add_argument("--beside", metavar="[ARM.]AGENT[@ITERATION]", help="a second policy that gets the same messages")
    chat.add_argument("--seed", type=_whole, metavar="N", help="of the sampling (default: the run's)")

    export = add("export", run_folder, help="a policy as a Hugging Face or peft folder")
    export.add_argument("--out", type=path_argument, required=True, help="folder to make")
    _policy(export)
    export.add_argument("--merge", action="store_true", help="merge an adapter into its base (in float32)")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: a model's as its base is stored, an adapter's as trained)",
    )

    _annotating(add("annotate", run_folder, help="people judge pairs of a run's responses, blind"))
    schema = add("schema", help="print the JSON schema of recipes, by which editors complete and check them")
    schema.add_argument(
        "--markdown", type=path_argument, metavar="DIR", help="write pages of all settings there instead"
    )
    add("env", help="versions, devices and which kernels run and why: for bug reports")
    completion = add("completion", help="print a script that completes macpo's commands and options in a shell")
    completion.add_argument("shell", choices=("bash", "zsh"), help='bash: eval "$(macpo completion bash)" in ~/.bashrc')
    return root


def _seeds(command: Parser, several: str) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--seed", type=_whole, metavar="N", help="another seed, as --set seed=N")
    which.add_argument("--seeds", metavar="A-B", help=several)


def _policy(command: Parser) -> None:
    command.add_argument("--agent", default="", help="the student's (default), a teacher's name, or ceiling")
    command.add_argument("--iteration", type=int, default=-1, help="-1 is the last (default)")
    command.add_argument("--policy", choices=("positive", "negative"), default="positive")
    command.add_argument("--arm", default="", help="an ablation arm's policy instead of the main run's")


def _comparing(compare: Parser) -> None:
    compare.add_argument("--methods", default="all", help="baselines, separated by commas (default: all)")
    compare.add_argument("--seeds", metavar="A-B", help="seeds, such as 0-4 or 1,5,9 (default: the recipe's)")
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


def _judging(evaluate: Parser) -> None:
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


def _annotating(annotate: Parser) -> None:
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


def _fitting(plan: Parser) -> None:
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
        ("--response-tokens", "mean of a response (default 80)"),
        ("--microbatch-tokens", "of a packed row (default 8192)"),
    ):
        plan.add_argument(name, type=_positive, help=f"with --model or --table: {what}")


def _positive(text: str) -> int:
    return _whole(text, at_least=1)


def _whole(text: str, at_least: int = 0) -> int:
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"got {text!r}, which is no whole number from {at_least}")
    return int(text)


def _overrides(command: Parser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=C",
        help="set a field of the recipe, the value in YAML: --set student.model=PATH; as often as needed",
    )
    command.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved recipe, every field explained, and stop",
    )
