"""Run a recipe on every process of a torchrun job.

    torchrun --nproc-per-node 8 engine/train.py recipes/hh-helpful.yaml --set student.model=PATH

The recipe's key `recipe:` names its kind (default: macpo), and an entry point of the group `macpo.recipes` runs that
kind, so that the engine never imports upwards.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # torchrun puts this folder first, where our module names would hide others

from torch.distributed.elastic.multiprocessing.errors import record

from macpo.engine.console import run_cli
from macpo.engine.distributed import watchdog
from macpo.engine.distributed.launcher import PARENT, leave_error
from macpo.engine.distributed.world import World, finish, init_from_env
from macpo.engine.errors import ConfigError
from macpo.engine.paths import argument
from macpo.engine.processes import die_with
from macpo.engine.recipe import kind_of


def runner(config: Path) -> Callable[..., None]:
    """The function that runs recipes of the file's kind: (path, overrides, world, options) -> None."""
    written, line = kind_of(config)
    found = {point.name: point for point in entry_points(group="macpo.recipes")}
    kind = written or "macpo"
    if kind not in found:
        said, fix = f"no package runs recipes of kind {kind!r}", f"use {' or '.join(sorted(found))}"
        raise ConfigError(said, fix, file=config, line=line, field="recipe")
    return found[kind].load()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="torchrun engine/train.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", type=argument, help="recipe (YAML), or the folder of a run")
    overriding = "set a field of the recipe, the value in YAML: --set student.model=PATH; as often as needed"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help=overriding)
    parser.add_argument("--rerun-stale", action="store_true", help="run stages again whose settings have changed")
    parser.add_argument("--from", dest="from_stage", metavar="STAGE", help="run this stage and all after it again")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds to wait for another rank")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def train(arguments: argparse.Namespace) -> None:
    world: World = init_from_env(arguments.timeout)
    if world.size > 1:
        watchdog.watch(arguments.timeout)
    try:
        try:
            run = runner(arguments.config)
        except ConfigError as error:
            error.relayed = not world.is_main  # every rank finds it, one says it
            raise
        run(
            arguments.config,
            arguments.overrides,
            world=world,
            rerun_stale=arguments.rerun_stale,
            from_stage=arguments.from_stage,
        )
    finally:
        watchdog.rest()
        finish()


@record
def main() -> None:
    arguments = parse()
    if PARENT in os.environ:
        die_with(int(os.environ[PARENT]))
    sys.exit(run_cli(lambda: train(arguments), debug=arguments.debug, report=leave_error))


if __name__ == "__main__":
    main()
