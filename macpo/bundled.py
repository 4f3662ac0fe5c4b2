"""The recipes that come with the package, by their names."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

ARMS = ("ablations", "demo-ablations", "methods")
"""Files beside the recipes that hold arms of comparisons."""
SCHEMA = "macpo.schema.json"
"""What editors check recipes by; it lies beside them, as `macpo schema` prints it."""


def folder() -> Path:
    return Path(str(files("macpo.recipes")))


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml") if path.stem not in ARMS)


def located(path: Path) -> Path:
    """A path where something is, else the file of the recipe of that name, if the package brings one."""
    return path if path.exists() else path_of(str(path)) or path


def path_of(name: str) -> Path | None:
    """The file of a recipe that the package brings; None where it brings none of that name."""
    return folder() / f"{name}.yaml" if name in names() else None
