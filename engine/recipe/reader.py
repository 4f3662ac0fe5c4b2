"""Recipes: strict YAML to a pydantic model and back; reports all problems at once, each with line and remedy.

settings = load(Path("recipe.yaml"), MySettings, ["student.optim.epochs=2"])
text = dump(settings, comments=True)
"""

from __future__ import annotations

import copy
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from macpo.engine.errors import ConfigError, Problem
from macpo.engine.files import read_bytes
from macpo.engine.recipe.problems import explain
from macpo.engine.recipe.tree import assign, from_plain, merge, parse, scalar

ModelT = TypeVar("ModelT", bound=BaseModel)


def load(
    path: Path | str,
    model: type[ModelT],
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> ModelT:
    """Load a recipe; the file overrides `defaults`, and `overrides` (`a.b.0.c=value`, the value in YAML) the file.

    Types are strict: `"3"` is no number, `yes` no boolean. Environment variables are not expanded. Relative paths are
    relative to `base`, by default the working folder (engine/paths.py).
    Raises: ConfigError with one Problem for each mistake.
    """
    path = Path(path)
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=path, line=line) from None
    return loads(text, model, overrides, file=str(path), defaults=defaults, base=base)


def loads(
    text: str | Mapping[str, Any],
    model: type[ModelT],
    overrides: Sequence[str] = (),
    *,
    file: str = "recipe",
    defaults: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> ModelT:
    """`load` for a text, or for its content as nested values; `file` is its name in messages."""
    problems: list[Problem] = []
    root = parse(text, file, problems) if isinstance(text, str) else from_plain(text, file)
    if not isinstance(root.value, dict):
        if not root.bad:
            problems.append(Problem("a recipe is a mapping", "write `key: value` lines", file, root.line))
        raise ConfigError(problems=problems)
    if defaults:
        root = merge(from_plain(defaults, "defaults"), root)
    if overrides:
        root = copy.deepcopy(root)
    for wish in overrides:
        assign(root, wish, problems)
    try:
        settings = model.model_validate_json(json.dumps(root.plain()), strict=True, context={"base": base})
    except ValidationError as error:
        problems += explain(error, root, model, file)
    if problems:
        raise ConfigError(problems=problems)
    return settings


def kind_of(path: Path | str) -> tuple[str | None, int | None]:
    """Value and line of the key `recipe` in a recipe file (or a run's folder).

    (None, None) if the key is missing, or the file cannot be read, which `load` then reports.
    """
    return written(path, "recipe")


def written(path: Path | str, key: str) -> tuple[str | None, int | None]:
    """Text and line of a top-level key as a recipe file (or a run's folder) has it, before anything is checked.

    (None, None) if the key is missing, or the file cannot be read, which `load` then reports.
    """
    path = Path(path)
    file = path / "recipe.yaml" if path.is_dir() else path
    try:
        root = parse(read_bytes(file).decode("utf-8-sig"), str(file), [])
    except (ConfigError, OSError, UnicodeDecodeError):
        return None, None
    found = root.value.get(key) if isinstance(root.value, dict) else None
    return (None, None) if found is None or found.value is None else (str(found.value), found.line)


def dump(model: BaseModel, *, comments: bool = False) -> str:
    """YAML of every field, including defaults, such that `loads(dump(x), type(x)) == x`.

    `comments`: write each field's docstring above it.
    """
    lines: list[str] = []
    if comments and type(model).__doc__:
        lines += [*_comment(type(model).__doc__ or "", 0), ""]
    return "\n".join([*lines, *_block(model, 0, comments), ""])


def _block(value: BaseModel | Mapping[str, Any], indent: int, comments: bool) -> list[str]:
    lines: list[str] = []
    for name, child, doc in _items(value):
        if comments and doc:
            lines += _comment(doc, indent)
        lines += _entry(f"{' ' * indent}{_text(name)}:", child, indent, comments)
    return lines


def _items(value: BaseModel | Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    if isinstance(value, Mapping):
        return [(str(key), child, "") for key, child in value.items()]
    found = []
    for name, info in type(value).model_fields.items():
        child = getattr(value, name)
        doc = info.description or (isinstance(child, BaseModel) and type(child).__doc__) or ""
        found.append((info.alias or name, child, doc))
    return found


def _entry(head: str, value: Any, indent: int, comments: bool) -> list[str]:
    if isinstance(value, BaseModel | Mapping):
        inner = _block(value, indent + 2, comments)
        return [head, *inner] if inner else [f"{head} {{}}"]
    if isinstance(value, list | tuple) and any(isinstance(item, BaseModel | Mapping) for item in value):
        lines = [head]
        for item in value:
            inner = _entry(" " * (indent + 2) + "-", item, indent + 2, comments)
            if inner[0].endswith("-") and len(inner) > 1:  # the dash goes onto the item's first line that is no comment
                first = next(i for i, line in enumerate(inner[1:], 1) if not line.lstrip().startswith("#"))
                inner[first] = " " * (indent + 2) + "- " + inner[first][indent + 4 :]
                inner = inner[1:]
            lines += inner
        return lines
    return [f"{head} {flow(value)}"]


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    value = to_jsonable_python(value)
    if isinstance(value, list):  # sets and the like
        return flow(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
        digits, e, exponent = repr(value).partition("e")
        return digits + (".0" if e and "." not in digits else "") + e + exponent  # YAML 1.1 readers want the point
    return _text(value) if isinstance(value, str) else str(value)


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_OLD_BOOL = {"y", "n", "yes", "no", "on", "off"}  # other YAML readers take these for booleans
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _text(text: str) -> str:
    """The text as a YAML scalar: bare if that is safe, else in double quotes."""
    if _PLAIN.fullmatch(text) and scalar(text) == text and text.lower() not in _OLD_BOOL:
        return text
    return _ESCAPED.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text, ensure_ascii=False))


def _comment(text: str, indent: int) -> list[str]:
    width = 100 - indent
    return [f"{' ' * indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), width)]
