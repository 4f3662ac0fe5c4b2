"""The kinds of recipe, `macpo`, `sft` and `preference`: how each is read and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.run.stages import Graph
from macpo.iteration import build_plan
from macpo.method.run_plan import Plan
from macpo.standalone import graph as standalone
from macpo.standalone.config import PreferenceRecipe, SftRecipe, Standalone

AnyRecipe: TypeAlias = Recipe | Standalone


KINDS: dict[str, type[AnyRecipe]] = {"macpo": Recipe, "sft": SftRecipe, "preference": PreferenceRecipe}
"""What the key `recipe:` of a recipe file can say."""


def load(path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """A recipe file, or the resolved recipe of a run's folder; its key `recipe` says of which kind it is."""
    file = path / "recipe.yaml" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"there is no recipe {str(file)!r}", "name a YAML recipe or the folder of a run")
    written, line = recipes.kind_of(file)
    kind = written or "macpo"
    if kind not in KINDS:
        raise ConfigError(f"got {kind!r}", f"use {', '.join(KINDS)}", file=str(file), line=line, field="recipe")
    recipe = recipes.load(file, KINDS[kind], overrides)
    if isinstance(recipe, Recipe):
        for arm in recipe.ablations:
            recipe.arm(arm)
    return recipe


def plan_of(recipe: AnyRecipe) -> Plan:
    """The stages of a recipe of any kind."""
    return build_plan(recipe) if isinstance(recipe, Recipe) else standalone.build_plan(recipe)


def build_graph(config: Mapping[str, Any]) -> Graph:
    """The graph of a resolved recipe; worker processes rebuild it by this function's name."""
    return plan_of(KINDS[config["recipe"]].model_validate(config)).graph
