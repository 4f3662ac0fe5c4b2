"""The kinds of recipe, `macpo`, `sft`, `preference` and `reward`: how each is read and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from macpo import bundled
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.paths import absolute, expanded
from macpo.engine.recipe.other_names import value_of
from macpo.engine.run.stages import Graph
from macpo.method.identities import Identities
from macpo.method.run_plan import Plan
from macpo.methods.registry import build_plan
from macpo.standalone import graph as standalone
from macpo.standalone.config import PreferenceRecipe, RewardRecipe, SftRecipe, Standalone

AnyRecipe: TypeAlias = Recipe | Standalone


KINDS: dict[str, type[AnyRecipe]] = {
    "macpo": Recipe,
    "sft": SftRecipe,
    "preference": PreferenceRecipe,
    "reward": RewardRecipe,
}
"""What the key `recipe:` of a recipe file can say."""


def load(path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """A recipe file, the resolved recipe of a run's folder, or by its name a recipe that the package brings.

    Its key `recipe` says of which kind it is. Relative paths become absolute: those of a file and of `overrides`
    relative to the working folder. A run's folder is its `output`, wherever it was moved to.
    """
    path = bundled.located(path)
    file = path / "recipe.yaml" if path.is_dir() else path
    if not file.exists():
        fix = f"name a YAML recipe, the folder of a run, or one of {', '.join(bundled.names())}"
        raise ConfigError(f"there is no recipe {str(file)!r}", fix)
    said, line = recipes.kind_of(file)
    kind = _known(said or "macpo", str(file), line)
    base = _began_in(path) if path.is_dir() else None
    if base is not None:  # the run's own paths are relative to where it began, those of `overrides` to here
        recipe = _resolved(recipes.load(file, KINDS[kind], base=base), base)
        recipe = recipes.loads(recipes.dump(recipe), KINDS[kind], overrides, file=str(file))
    else:
        recipe = recipes.load(file, KINDS[kind], overrides)
    if path.is_dir() and not any(each.partition("=")[0].strip() == "output" for each in overrides):
        recipe = recipe.model_copy(update={"output": absolute(str(path))})
    return _resolved(recipe)


def of_mapping(content: Mapping[str, Any], overrides: Sequence[str] = ()) -> AnyRecipe:
    """A recipe's content as nested values; relative paths become absolute, relative to the working folder."""
    kind = _known(str(content.get("recipe", "macpo")), "recipe")
    return _resolved(recipes.loads(content, KINDS[kind], overrides))


def _known(kind: str, file: str, line: int | None = None) -> str:
    """The kind of a recipe. Raises ConfigError for one that there is not."""
    if kind not in KINDS:
        fix = f"write {ours}" if (ours := value_of("recipe", kind)) else f"use {', '.join(KINDS)}"
        raise ConfigError(f"got {kind!r}", fix, file=file, line=line, field="recipe")
    return kind


def _resolved(recipe: AnyRecipe, base: Path | None = None) -> AnyRecipe:
    return recipe.with_resolved_arms(base=base) if isinstance(recipe, Recipe) else recipe


def _began_in(run_dir: Path) -> Path | None:
    """Where a run began whose stored recipe still has relative paths, as earlier versions wrote them.

    Its `output` is relative too and ends the path of its folder; None where paths are absolute or it was moved.
    """
    output, _ = recipes.written(run_dir, "output")
    if output is None or expanded(output).is_absolute():
        return None
    parts, here = Path(output).parts, run_dir.absolute()
    return Path(*here.parts[: -len(parts)]) if parts and here.parts[-len(parts) :] == parts else None


def plan_of(recipe: AnyRecipe, *, must_exist: bool = True) -> Plan:
    """The stages of a recipe of any kind.

    `must_exist`: whether data and models have to be here; without them finished stages count as made from them.
    """
    identities = Identities(must_exist=must_exist)
    return build_plan(recipe, identities) if isinstance(recipe, Recipe) else standalone.build_plan(recipe, identities)


def build_graph(config: Mapping[str, Any]) -> Graph:
    """The graph of a resolved recipe; worker processes rebuild it by this function's name."""
    return plan_of(KINDS[config["recipe"]].model_validate(config)).graph
