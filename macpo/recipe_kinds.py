"""The kinds of recipe, `macpo`, `sft` and `preference`: how each is read and planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.run.stages import Graph
from macpo.iteration import build_plan
from macpo.method.ready_policies import Named, check_policies
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


def check_models(recipe: AnyRecipe) -> None:
    """Check every model and adapter that the recipe names, from configs and headers alone, before any work.

    Raises:
        ConfigError: all that cannot be used as the recipe says, each with its field.
    """
    if isinstance(recipe, Recipe):
        agents: list[Named] = []
        for arm in (recipe, *map(recipe.arm, recipe.ablations)):
            agents += [named for named in _named(arm) if named not in agents]
    else:
        reference = recipe.training.reference_model if isinstance(recipe, PreferenceRecipe) else None
        (agent,) = recipe.agents
        agents = [
            Named(agent, positive="adapter", reference="training.reference_model", reference_model=reference),
        ]
    check_policies(agents, trust_remote_code=recipe.trust_remote_code)


def _named(recipe: Recipe) -> Iterator[Named]:
    roles = [(f"teachers.{k}", agent, "teacher_training") for k, agent in enumerate(recipe.teachers)]
    for where, agent, role in (*roles, ("student", recipe.student, "student_training")):
        preference = getattr(recipe, role).preference
        yield Named.under(where, agent, f"{role}.preference", preference.reference_model)


def build_graph(config: Mapping[str, Any]) -> Graph:
    """The graph of a resolved recipe; worker processes rebuild it by this function's name."""
    return plan_of(KINDS[config["recipe"]].model_validate(config)).graph
