"""The recipes that the package brings: the demo's, and those that `macpo init` copies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from macpo import bundled
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.errors import ConfigError
from macpo.engine.files import atomic_write
from macpo.engine.recipe.tree import Node, parse

REQUIRED = "# required"
"""Marks the lines of a recipe that nobody else can fill in."""
OWN = ("data", "model", "init", "template", "context_tokens", "teachers", "student")
"""What people change first in a recipe that runs as it is."""


def demo_recipe(overrides: Sequence[str] = (), *, ablations: bool = False) -> Recipe:
    """The demo's recipe, with the ablation arms where they are asked for."""
    if ablations:
        arms = yaml.safe_load((bundled.folder() / "demo-ablations.yaml").read_text(encoding="utf-8"))
        overrides = [f"ablations={json.dumps(arms)}", *overrides]
    return recipes.load(bundled.folder() / "demo.yaml", Recipe, overrides)


def copy_recipe(name: str, path: Path | None) -> str:
    """Write one of the package's recipes, comments included, and say what to fill in; `list` only names them.

    The copy's `output` is `runs/` and its own name. The schema by which editors check it lies beside it.

    Args:
        path: the file; without the ending of YAML a folder, in which it gets the recipe's name. Folders are made.

    Raises:
        ConfigError: an unknown name, an existing file.
    """
    if path is None:
        return "\n".join(bundled.names())
    source = bundled.path_of(name)
    if source is None:
        raise ConfigError(f"no recipe {name!r}", f"use one of {', '.join(bundled.names())}", field="--like")
    if path.suffix not in (".yaml", ".yml"):
        path = path / f"{name}.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists", "name a new file")
    run = f"runs/{path.stem}"
    written = run if re.fullmatch(r"[\w./-]+", run) else json.dumps(run, ensure_ascii=False)
    text = source.read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", str(path))
    text = re.sub(r"^output: .*$", lambda _: f"output: {written}", text, count=1, flags=re.MULTILINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)
    atomic_write(path.parent / bundled.SCHEMA, (bundled.folder() / bundled.SCHEMA).read_text(encoding="utf-8"))
    wrote = f"wrote {path}, a copy of {name}, and {bundled.SCHEMA} for editors; its run goes to {run}"
    return "\n".join([wrote, *_to_fill_in(path, text), f"next: macpo check {path}"])


def _to_fill_in(path: Path, text: str) -> list[str]:
    """What the recipe lacks, or where it says what it runs on, with line numbers."""
    places = {line: field for field, line in _places(parse(text, str(path), []))}
    required = {
        number: line.partition(REQUIRED)[2].lstrip(": ")
        for number, line in enumerate(text.splitlines(), 1)
        if REQUIRED in line
    }
    if required:
        return ["fill in:", *(f"  {path}:{number}: {places[number]}: {what}" for number, what in required.items())]
    own = [f"  {path}:{line}: {field}" for line, field in sorted(places.items()) if field in OWN]
    return ["it runs as it is; your own data and models go to:", *own]


def _places(node: Node, above: str = "") -> Iterator[tuple[str, int]]:
    """Every field with its line; of several on one line the innermost comes last."""
    inside = node.value.items() if isinstance(node.value, dict) else []
    if isinstance(node.value, list):
        inside = [(str(index), child) for index, child in enumerate(node.value)]
    for key, child in inside:
        field = f"{above}.{key}" if above else key
        if child.line is not None and (not isinstance(child.value, dict | list) or not above):
            yield field, child.line
        yield from _places(child, field)
