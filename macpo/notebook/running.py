"""A run as a function: a recipe, run to its end in the notebook's own process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from macpo.commands import run as command
from macpo.engine.errors import ConfigError, shown
from macpo.engine.files import explain, is_expected
from macpo.engine.paths import expanded
from macpo.engine.processes import THREAD_VARIABLES
from macpo.engine.run.attempts import COMMAND
from macpo.notebook.results import Run
from macpo.recipe_kinds import load, of_mapping


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    set: Mapping[str, Any] | None = None,
    seed: int | None = None,
    output: str | os.PathLike[str] | None = None,
    rerun_stale: bool = False,
    from_stage: str | None = None,
) -> Run:
    """Run a recipe to its end in this process, as `macpo run` does, and return its folder.

    Interrupted (Ctrl-C, or the notebook's stop button) it stops at the next safe point, a second time at once; the same
    call resumes. Stages that are done are not run again. Signal handlers and CPU threads are then as they were before.
    Several processes share a run under `macpo run --ranks` or torchrun only.

    Args:
        recipe: a recipe's file, the folder of a run, the name of a recipe that comes along ("demo"), or its content.
        set: field by dotted path -> value, such as {"student_training.preference.beta": 0.2}, as `--set` does.
        seed, output: the recipe's fields, which are changed most.
        rerun_stale: run stages again whose settings or inputs have changed.
        from_stage: run this stage and all after it again.

    Raises:
        ConfigError: what is wrong with recipe, data and models, all at once, or stale stages.
        Stopped: interrupted; call it again.
        MacpoError: whatever else a stage can meet, as on the command line.
    """
    wishes = {"seed": seed, "output": output}
    wishes = {name: value for name, value in wishes.items() if value is not None}
    for name in wishes.keys() & (set or {}).keys():
        raise ConfigError(f"{name} is given twice", f"leave it out of set, or leave {name}= out", field=name)
    overrides = [f"{name}={_json(value, name)}" for name, value in {**(set or {}), **wishes}.items()]
    if isinstance(recipe, Mapping):
        resolved = of_mapping(json.loads(_json(recipe, "recipe")), overrides)
    else:
        resolved = load(expanded(Path(recipe)), overrides)
    try:
        with _threads_restored():
            return Run(command.run(resolved, rerun_stale=rerun_stale, from_stage=from_stage))
    except OSError as error:
        if is_expected(error):  # a full disk, or a place that cannot be written
            raise explain(error) from error
        raise


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    """Context after which operators have as many CPU threads as before, whatever a recipe sets.

    The report then names this function as the command, where a notebook's own would say nothing.
    """
    changed = (*THREAD_VARIABLES, COMMAND)
    variables, threads = {name: os.environ.get(name) for name in changed}, torch.get_num_threads()
    os.environ.setdefault(COMMAND, "macpo.run(…) in Python")
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(threads)


def _json(value: Any, name: str) -> str:
    """A value as JSON, which is YAML too; paths become text, numbers of NumPy and torch Python's own."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"got {shown(value)} ({error})", "give what YAML can hold", field=name) from None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else os.fspath(value)
