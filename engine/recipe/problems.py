"""Translates pydantic's errors to lines of the recipe: field, value found, values allowed, and remedy."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from macpo.engine.errors import Problem, shown
from macpo.engine.recipe.other_names import NOTES, field_of, value_of, why_needless
from macpo.engine.recipe.tree import Node, scalar


@dataclass(slots=True)
class _Spot:
    """The place of an error: its field path without union labels, the expected type, the nearest node."""

    path: tuple[str, ...]
    kind: Any
    parent: Any
    node: Node
    in_union: bool = False
    bad: bool = False


def explain(error: ValidationError, root: Node, model: type[BaseModel], file: str) -> list[Problem]:
    """One Problem per wrong field, in the file's order."""
    spots: dict[tuple[str, ...], list[tuple[_Spot, Mapping[str, Any]]]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        spot = _locate(detail["loc"], root, model)
        kind, depth = detail["type"], len(detail["loc"])
        if kind == "too_short" and any(d["loc"][:depth] == detail["loc"] for d in details if d is not detail):
            continue  # pydantic counts the items without those that are wrong themselves
        if kind == "default_factory_not_called":  # this default depends on a field that is wrong itself
            continue
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            tags = [tag for member in _members(spot.kind) if _is_model(member) for tag in _tags(member)]
            spot = _down(spot, str(detail["ctx"]["discriminator"]).strip("'"))
            spot.kind = Literal[tuple(tags)] if tags else None
        elif kind in ("value_error", "assertion_error"):
            said = _message(detail)
            for word in said.split(":")[0].split(" ")[0].split("."):
                is_here = isinstance(spot.node.value, dict) and word in spot.node.value
                if is_here or said.startswith(f"{word} is missing"):
                    spot = _down(spot, word)
        if not spot.bad:
            spots.setdefault(spot.path, []).append((spot, detail))
    problems = []
    for path, found in spots.items():
        # Each alternative of a union complains; the one that matches furthest tells the reader most.
        if found[0][0].in_union and any(other[: len(path)] == path != other for other in spots):
            continue
        problems.append(_problem(path, found, model, root, file))
    return sorted(problems, key=lambda p: (p.file != file, p.line or 0))


def _problem(
    path: tuple[str, ...], found: list[tuple[_Spot, Mapping[str, Any]]], model: type[BaseModel], root: Node, file: str
) -> Problem:
    spot, detail = found[0]
    where = spot.node.file or file, spot.node.line, ".".join(path)
    match detail["type"]:
        case "missing" | "union_tag_not_found":
            allowed = _alternatives(spot.kind)
            if path and isinstance(spot.node.value, dict) and not spot.node.value.get(path[-1]):
                suggestion = _near(path[-1], [key for key in spot.node.value if key not in _names(spot.parent)])
                if suggestion:
                    return Problem("missing", f"rename {suggestion!r} to {path[-1]!r}", *where)
            return Problem("missing", f"add it: {allowed}" if allowed else "add it", *where)
        case "extra_forbidden":
            return Problem("unknown key", _known(path, spot.parent, model), *where)
        case "union_tag_invalid":
            allowed = str(detail["ctx"]["expected_tags"])
            return _wrong(detail["ctx"]["tag"], [allowed], where)
        case "value_error" | "assertion_error":
            text, _, fix = _message(detail).partition(" Fix: ")
            return Problem(_named_once(text, path), fix or "change one of the two or leave it to its default", *where)
        case "too_short":
            return Problem(f"needs at least {detail['ctx']['min_length']} of them", "add to the list", *where)
        case _:
            return _wrong(detail["input"], [_message(each) for _, each in found], where)


_WORDS = {
    "an object": "a mapping",
    "a valid dictionary": "a mapping",
    "a valid array": "a list",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}
_FIXES = {
    "a mapping": "write `key: value` lines below the field",
    "a list": "write a whole list, such as [a, b]",
    "text": "put it in quotes",
}


def _wrong(value: Any, messages: list[str], where: tuple[str, int | None, str]) -> Problem:
    allowed = list(dict.fromkeys(_WORDS.get(message, message) for message in messages))
    text = " or ".join(allowed)
    fix = _FIXES.get(text) or (f"it should {text}" if text.startswith("have ") else f"use {text}")
    if text.startswith(("greater", "less")):
        fix = f"use a value {text}"
    if (ours := value_of(where[2].rpartition(".")[2], value)) and ours.partition(",")[0] in text:
        fix = f"write {ours}"
    elif isinstance(value, str):
        near = _near(value, re.findall(r"'([^']*)'", text))
        if near:
            fix = f"did you mean {near!r}"
        elif text in ("a whole number", "a number") and isinstance(scalar(value.replace("_", "")), int | float):
            fix = "write the number without quotes or separators"
    got = "a mapping" if isinstance(value, dict) else shown(value)
    return Problem(f"got {got}, allowed: {text}", fix, *where)


def _named_once(text: str, path: tuple[str, ...]) -> str:
    """A validator's text whose first words name the field: by its whole path, which the error then gives no more."""
    for start in range(len(path)):
        name, rest = ".".join(path[start:]), text[len(".".join(path[start:])) :]
        if text.startswith(name) and rest[:1] in (" ", ":"):
            return rest[1:].lstrip() if rest[0] == ":" else ".".join(path) + rest
    return text


def _message(detail: Mapping[str, Any]) -> str:
    text = str(detail["msg"])
    for start in ("Value error, ", "Assertion failed, ", "Input should be ", "Input should "):
        text = text.removeprefix(start)
    return text


def _locate(loc: tuple[int | str, ...], root: Node, model: type[BaseModel]) -> _Spot:
    spot = _Spot((), model, None, root, bad=root.bad)
    for part in loc:
        members = _members(spot.kind)
        if len(members) > 1:  # pydantic puts the alternative's label or tag here
            spot.kind = _chosen(members, str(part))
            spot.in_union = True
            continue
        kind = members[0] if members else None
        if kind is None and _inside(spot.node, part) is None:
            continue  # a label inside a type that this walk does not know
        if get_origin(kind) is dict and part == "[key]":
            continue
        spot.kind = kind
        spot = _down(spot, part)
    return spot


def _down(spot: _Spot, part: int | str) -> _Spot:
    node = _inside(spot.node, part) or spot.node
    kind = _child(spot.kind, part)
    return _Spot((*spot.path, str(part)), kind, spot.kind, node, spot.in_union, spot.bad or node.bad)


def _inside(node: Node, part: int | str) -> Node | None:
    if isinstance(node.value, list):
        return node.value[part] if isinstance(part, int) and part < len(node.value) else None
    return node.value.get(str(part)) if isinstance(node.value, dict) else None


def _members(kind: Any) -> list[Any]:
    """The alternatives of a type, without None and annotations; a single type is the only alternative."""
    while get_origin(kind) is Annotated or hasattr(kind, "__value__"):  # the latter is a `type X = …` alias
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind.__value__
    if get_origin(kind) in (Union, types.UnionType):
        return [one for each in get_args(kind) if each is not type(None) for one in _members(each)]
    return [] if kind is None else [kind]


def _chosen(members: list[Any], label: str) -> Any:
    """The alternative that a label names: a discriminator's value or a class name."""
    for member in members:
        if _is_model(member) and (member.__name__ == label or label in _tags(member)):
            return member
    return None


def _tags(model: type[BaseModel]) -> list[str]:
    """Possible discriminator values of this model: its Literal fields with a single value."""
    literal = [info.annotation for info in model.model_fields.values() if get_origin(info.annotation) is Literal]
    return [str(get_args(kind)[0]) for kind in literal if len(get_args(kind)) == 1]


def _child(kind: Any, part: int | str) -> Any:
    """The type of a field, item or value inside `kind`; None if unknown."""
    if _is_model(kind):
        fields = {info.alias or name: info for name, info in kind.model_fields.items()}
        return fields[str(part)].annotation if str(part) in fields else None
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict and len(args) == 2:
        return args[1]
    if origin is tuple and isinstance(part, int) and args and args[-1] is not Ellipsis:
        return args[part] if part < len(args) else None
    return args[0] if origin in (list, tuple, set, frozenset) and args else None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _names(kind: Any) -> list[str]:
    return [info.alias or name for name, info in kind.model_fields.items()] if _is_model(kind) else []


def _alternatives(kind: Any) -> str:
    values = [repr(value) for each in _members(kind) if get_origin(each) is Literal for value in get_args(each)]
    return " or ".join(values)


def _near(word: str, names: list[str]) -> str:
    return next(iter(difflib.get_close_matches(word, names, 1, 0.6)), "")


def _known(path: tuple[str, ...], block: Any, model: type[BaseModel]) -> str:
    """The remedy for an unknown key: what others call so, a similar key, the same key elsewhere, or the known keys."""
    key, names = path[-1], _names(block)
    if ours := field_of(key):
        wanted = tuple(ours.split("."))
        inside = [(*path[:-1], *place) for place in _everywhere(block)]
        if places := _ending(inside, wanted) or _ending(_everywhere(model), wanted):
            return f"it is called {_placed(places)}" + (f"; {NOTES[ours]}" if ours in NOTES else "")
    if why := why_needless(key):
        return f"leave it out: {why}"
    if near := _near(key, names):
        return f"did you mean {near!r}"
    elsewhere = [place for place in _ending(_everywhere(model), (key,)) if "evaluation" not in place]
    if elsewhere and tuple("0" if part.isdecimal() else part for part in path) not in elsewhere:
        return f"move it to {_placed(elsewhere)}"
    return f"known keys: {', '.join(names)}" if names else "delete it"


_OTHERS = {"init", "evaluation"}
"""Blocks with settings of other models than those that a recipe trains."""


def _ending(places: Iterable[tuple[str, ...]], wanted: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = [place for place in places if place[-len(wanted) :] == wanted]
    return [place for place in found if not set(place[:-1]) & _OTHERS] or found


def _placed(places: list[tuple[str, ...]]) -> str:
    """A field by its places: its path, or its name and the blocks that have it."""
    if len(places) == 1:
        return repr(".".join(places[0]))
    *blocks, last = (".".join(place[:-1]) for place in places)
    return f"{places[0][-1]!r}, in {', '.join(blocks)} or {last}"


def _everywhere(kind: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field of a model, with 0 for the items of its lists."""
    for name, info in kind.model_fields.items() if _is_model(kind) else ():
        here = (*above, info.alias or name)
        yield here
        for member in _members(info.annotation) if len(above) < 4 else ():
            item = get_args(member)[0] if get_origin(member) in (list, tuple) else None
            yield from _everywhere(member, here) if item is None else _everywhere(item, (*here, "0"))
