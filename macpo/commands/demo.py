"""The recipes that the package brings: the demo's, and those that `macpo init` copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import yaml

from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.files import atomic_write


def demo_recipe(overrides: Sequence[str] = (), *, ablations: bool = False) -> Recipe:
    """The demo's recipe, with the ablation arms where they are asked for."""
    folder = files("macpo.recipes")
    if ablations:
        arms = yaml.safe_load(folder.joinpath("demo-ablations.yaml").read_text(encoding="utf-8"))
        overrides = [f"ablations={json.dumps(arms)}", *overrides]
    with as_file(folder.joinpath("demo.yaml")) as path:
        return recipes.load(path, Recipe, overrides)


def copy_recipe(name: str, path: Path) -> str:
    """Write one of the package's recipes to `path`, comments included; `list` only names them.

    Raises ConfigError for an unknown name or an existing file.
    """
    folder = files("macpo.recipes")
    files_of = {item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")}
    known = sorted(files_of - {"demo-ablations", "ablations", "methods"})  # arms are no recipes
    if name == "list":
        return "\n".join(known)
    if name not in known:
        raise ConfigError(f"no recipe {name!r}", f"one of {', '.join(known)}", field="--like")
    if path.exists():
        raise ConfigError(f"{path} exists", "name a new file")
    atomic_write(path, folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return f"wrote {path}; next: macpo check {path}"
