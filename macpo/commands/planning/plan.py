"""`macpo plan RECIPE`: the stages with what they cost, as text."""

from __future__ import annotations

from pathlib import Path

from macpo.commands.planning.estimates import Hardware, estimate, hardware_of
from macpo.config import Recipe
from macpo.engine.files import free_bytes
from macpo.recipe_kinds import AnyRecipe, plan_of
from macpo.standalone.config import Standalone
from macpo.standalone.records import Sets, read_sets


def show(recipe: AnyRecipe, hardware: Hardware | None = None) -> str:
    """The plan as text; of a standalone recipe with exact numbers of rows and steps. No model is loaded.

    Raises:
        MacpoError: data or models that cannot be read.
    """
    plan = plan_of(recipe)
    hardware = hardware or hardware_of(recipe)
    sets = None if isinstance(recipe, Recipe) else read_sets(recipe.data, recipe.seed)
    rows = estimate(recipe, plan, hardware, sets)
    width = max(len(row.stage) for row in rows)
    lines = [
        f"{len(rows)} stages into {recipe.output}",
        "tokens, disk, memory and time are estimates; a rank, step and ckpt: memory, step time and checkpoint",
        "",
        f"{'stage':{width}} {'tokens':>12} {'disk':>8} {'time':>8} {'a rank':>8} {'step':>7} {'ckpt':>8}  base",
    ]
    for row in rows:
        base = f"{row.base}{' (load)' if row.load else ''}" if row.base else ""
        needs = step = saved = ""
        if row.training is not None:
            needs, saved = _size(row.training.memory.device), _size(row.training.checkpoint)
            step = f"{row.training.time.total:.2f} s"
            base += f"; DOES NOT FIT: {row.why_not}" if row.why_not else ""
        lines.append(
            f"{row.stage:{width}} {row.tokens:12,} {_size(row.disk_bytes):>8} {_time(row.seconds):>8} "
            f"{needs:>8} {step:>7} {saved:>8}  {base}".rstrip()
        )
    disk, seconds = sum(r.disk_bytes for r in rows), sum(r.seconds for r in rows)
    loads, kept = sum(r.load for r in rows), max(r.resident_bytes for r in rows)
    most = max((r.training.memory.device + r.beside_bytes for r in rows if r.training is not None), default=0.0)
    free = free_bytes(Path(recipe.output))
    lines += [
        "",
        *([] if isinstance(recipe, Recipe) or sets is None else [_exact(recipe, sets)]),
        f"disk: about {_size(disk)}" + (f" of {_size(free)} free" if free is not None else ""),
        f"memory: {_size(kept)} of base models stay loaded (up to {_size(hardware.budget(recipe.compute))} may), "
        f"{_counted(loads, 'load')}",
        *([f"peak: at most {_size(most)} in training, with the models that stay loaded"] if most else []),
        f"training: {_ranks(hardware)} with {_size(hardware.room)} each"
        + (f", calibrated by {hardware.machine.scale:.2f}" if hardware.machine.scale != 1.0 else "")
        + (", measured here with models of the same shapes" if hardware.rehearsed else ""),
        f"time: about {_time(seconds)} in one process"
        + (f", {recipe.compute.jobs} stages at once," if recipe.compute.jobs > 1 else "")
        + (
            " on a CPU of ordinary speed (--calibrate measures this one)"
            if hardware.guessed
            else f" on {hardware.machine.name}"
        ),
    ]
    return "\n".join(lines)


def _ranks(hardware: Hardware) -> str:
    return f"{hardware.ranks} ranks" if hardware.ranks > 1 else "one rank"


def _exact(recipe: Standalone, sets: Sets) -> str:
    """What is known of a standalone recipe's data without an estimate."""
    training = recipe.training
    steps = -(-len(sets.train) // training.batch) * training.epochs
    return (
        f"data: {len(sets.train):,} to train on, {len(sets.test):,} held out; {_counted(steps, 'step')} of "
        f"{training.batch} in {_counted(training.epochs, 'epoch')}, before prompts that are too long are dropped"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
