"""The arms of a comparison: methods, numbers of teachers, and the method without one of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import yaml

from macpo.comparison.ledger import ledgers
from macpo.config import Recipe
from macpo.engine.errors import ConfigError
from macpo.method.costs import RunSize
from macpo.methods.registry import METHODS, build_plan

Overrides = dict[str, Any]
Arms = dict[str, Overrides]
"""Name -> overrides of the recipe by dotted path."""


def named_arms(file: str) -> Arms:
    """The arms in one of the package's recipe files, such as `methods`."""
    text = files("macpo.recipes").joinpath(f"{file}.yaml").read_text(encoding="utf-8")
    found: Arms = yaml.safe_load(text)
    return found


def method_arms(recipe: Recipe, names: Sequence[str] | None) -> tuple[Arms, dict[str, str]]:
    """The baselines by name (None: all of them), and why some of them cannot run on this recipe.

    Raises:
        ConfigError: an unknown name.
    """
    known = named_arms("methods")
    unknown = [name for name in names or () if name not in known and name != "macpo"]
    if unknown:
        raise ConfigError(f"no method {unknown[0]!r}", f"use {', '.join(['macpo', *known])}", field="--methods")
    wanted = {name: arm for name, arm in known.items() if names is None or name in names}
    left_out = {name: why for name, arm in wanted.items() if (why := METHODS[arm["method"]].why_not(recipe))}
    return {name: arm for name, arm in wanted.items() if name not in left_out}, left_out


def teacher_arms(recipe: Recipe, counts: Iterable[int], orders: int | None = None) -> Arms:
    """Arms of fewer teachers: for each count K, K neighbours in the ring of teachers.

    The whole ring is the recipe itself, so it is no arm.

    Args:
        orders: number of places to begin at, evenly spread; None takes every place in the ring.

    Raises:
        ConfigError: more teachers, or more places, than the recipe has teachers.
    """
    teachers = [teacher.name for teacher in recipe.active_teachers]
    if orders is not None and not 1 <= orders <= len(teachers):
        raise ConfigError(f"got {orders}", f"the recipe has {len(teachers)} teachers", field="--k-orders")
    places = [each * len(teachers) // (orders or len(teachers)) for each in range(orders or len(teachers))]
    arms: Arms = {}
    for count in counts:
        if not 1 <= count <= len(teachers):
            raise ConfigError(f"got {count}", f"the recipe has {len(teachers)} teachers", field="--k-curve")
        for first in places if count < len(teachers) else ():
            chosen = [teachers[(first + k) % len(teachers)] for k in range(count)]
            arms[f"k{count}-{teachers[first]}"] = {"use_teachers": chosen}
    return arms


def matched(recipe: Recipe, arms: Arms, run: RunSize) -> Arms:
    """The arms with as many rounds as their student's optimiser steps stay within the recipe's own, at least one.

    Arms without rounds take fewer steps and stay as they are.
    """
    most = _steps(recipe, {"": {}}, run)
    found = {}
    for name, arm in arms.items():
        rounds = wanted = arm.get("iterations", recipe.iterations)
        while rounds > 1 and _steps(recipe, {name: {**arm, "iterations": rounds}}, run) > most:
            rounds -= 1
        found[name] = {**arm, "iterations": rounds} if rounds != wanted else arm
    return found


def _steps(recipe: Recipe, arms: Arms, run: RunSize) -> int:
    """Planned optimiser steps of the student in one arm; the recipe's own under the name ""."""
    (name,) = arms
    plan = build_plan(recipe.model_copy(update={"ablations": arms if name else {}}))
    return ledgers(plan, run, recipe)[name].student_steps
