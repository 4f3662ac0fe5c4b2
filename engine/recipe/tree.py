"""The strict subset of YAML that recipes may use, as a tree with the line of every key.

It is read from PyYAML's events, so nothing is ever constructed from a tag. Scalars follow YAML 1.2's core schema
(`1e-5` is a number, `no` is text). Tags, aliases and repeated keys are problems, all reported together.

Not by ruamel.yaml: its events and messages are the same, but take 1.5 times as long, and a `%YAML 1.3` line ends in an
AssertionError. It keeps repeated keys and positions only in trees that it constructs, and stops at the first such key.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from macpo.engine.errors import ConfigError, Problem, shown

_MAX_DEPTH = 50  # far beyond any recipe, below the limit of every parser involved

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(slots=True)
class Node:
    """A mapping, list or scalar; `line` is the line of its key or list item, `file` its source."""

    value: dict[str, Node] | list[Node] | Scalar
    file: str = ""
    line: int | None = None
    bad: bool = False  # already reported, so validation errors about it are ignored

    def plain(self) -> Any:
        """The value in plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def from_plain(value: Any, file: str = "") -> Node:
    """A tree of values without lines (defaults given in Python)."""
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(child, file) for key, child in value.items()}, file)
    if isinstance(value, list | tuple):
        return Node([from_plain(child, file) for child in value], file)
    return Node(value, file)


def parse(text: str, file: str, problems: list[Problem], *, lines: bool = True) -> Node:
    """The tree of one YAML document; forbidden content is appended to `problems`.

    `lines`: False leaves out line numbers (one-line sources). A text that is asked for again gives the same tree: copy
    it before you change it. Raises ConfigError if the text is not YAML at all.
    """
    root, found = _parse(text, file, lines)
    problems += found
    return root


@functools.lru_cache(maxsize=8)  # a command asks a recipe's kind, its place and its content, one after the other
def _parse(text: str, file: str, lines: bool) -> tuple[Node, tuple[Problem, ...]]:
    problems: list[Problem] = []
    try:
        events = yaml.parse(text.removeprefix("\ufeff"), Loader=yaml.SafeLoader)
        reader = _Reader(events, file, problems, lines)
        return reader.document(), tuple(problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" at column {mark.column + 1}" if mark else ""
        problem, line = f"not valid YAML{at}: {error.problem or error.context}", mark.line + 1 if mark else None
    except yaml.reader.ReaderError as error:
        problem = f"character U+{error.character:04X} is not allowed in YAML"
        line = text.count("\n", 0, error.position) + 1
    except (ValueError, OverflowError) as error:  # an escape of no character, a number of thousands of digits
        problem, line = f"not valid YAML: {error}", None
    except RecursionError:
        problem, line = "nested too deeply", None
    raise ConfigError(problem, "correct the text", file=file, line=line if lines else None)


class _Reader:
    def __init__(self, events: Iterator[Any], file: str, problems: list[Problem], lines: bool) -> None:
        self.events, self.file, self.problems, self.lines = events, file, problems, lines

    def document(self) -> Node:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Node({}, self.file)
        root = self.node(next(self.events), ())
        next(self.events)  # document end
        extra = next(self.events)
        if not isinstance(extra, yaml.StreamEndEvent):
            self.report("a second document (---) begins here", "keep one document a file", extra, ())
        return root if root.value is not None or root.bad else Node({}, self.file)

    def report(self, message: str, fix: str, event: Any, path: tuple[str, ...]) -> None:
        self.problems.append(Problem(message, fix, self.file, self.line(event), ".".join(path)))

    def line(self, event: Any) -> int | None:
        return event.start_mark.line + 1 if self.lines else None

    def node(self, event: Any, path: tuple[str, ...]) -> Node:
        if len(path) > _MAX_DEPTH:
            raise RecursionError
        node = Node(None, self.file, self.line(event))
        if isinstance(event, yaml.AliasEvent):
            self.report(f"the alias *{event.anchor} is not allowed", "write the value out", event, path)
            node.bad = True
            return node
        tag = event.tag or "!"
        if tag not in ("!", "tag:yaml.org,2002:str"):
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self.report(f"the tag {shown} is not allowed", "write a plain value without a tag", event, path)
            node.bad = True
        if isinstance(event, yaml.MappingStartEvent):
            node.value = self.mapping(path)
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self.sequence(path)
        else:
            text = event.value
            is_plain = event.style is None and tag == "!" and event.tag is None
            node.value = scalar(text) if is_plain else text
            if any("\ud800" <= char <= "\udfff" for char in text):
                self.report("the text has a lone surrogate", "remove it", event, path)
                node.value, node.bad = None, True
        return node

    def mapping(self, path: tuple[str, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self.report("a key is not plain text", "use a plain name as the key", event, path)
                self.node(event, path)
                self.node(next(self.events), path)
                continue
            key, line = event.value, self.line(event)
            child = self.node(next(self.events), (*path, key))
            child.line = line
            if key in found:
                first = f"first at line {found[key].line}" if self.lines else "twice"
                self.report(f"the key is given again ({first})", "keep one of the two", event, (*path, key))
            else:
                found[key] = child
        return found

    def sequence(self, path: tuple[str, ...]) -> list[Node]:
        found: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self.node(event, (*path, str(len(found)))))
        return found


_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(text: str) -> Scalar:
    """The value of an unquoted scalar (YAML 1.2, core schema)."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > 1000:  # Python rejects integers of thousands of digits
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def merge(below: Node, above: Node) -> Node:
    """`below` overridden by `above`: mappings merge key by key, everything else is replaced.

    Mappings whose `type` differs are alternatives of one another, so they are replaced too.
    """
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    if {"type"} <= below.value.keys() & above.value.keys() and below.value["type"].value != above.value["type"].value:
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return replace(above, value=merged)


def assign(root: Node, wish: str, problems: list[Problem]) -> None:
    """Apply one `a.b.0.c=value` (the value is YAML) to the tree; its mistakes are appended to `problems`."""
    source = f"--set {wish}"
    path, equals, text = wish.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        problems.append(Problem("expected a.b.c=value", "write the field, =, and its value", source))
        return
    try:
        value = copy.deepcopy(parse(text, source, problems, lines=False))
    except ConfigError as error:
        problems.extend(error.problems)
        return
    if text.strip() in _NULL:  # an empty document is an empty recipe, an empty value is null
        value = Node(None, source)
    spot = above = root
    for index, part in enumerate(parts):
        here, last = ".".join(parts[:index]) or "the recipe", index == len(parts) - 1
        if isinstance(spot.value, list):
            size = len(spot.value)
            if not part.isdecimal() or int(part) >= size:
                fix = f"use an index from 0 to {size - 1} or set the whole list"
                problems.append(Problem(f"{here} is a list of {size} items, {part!r} is not one", fix, source))
                return
            if last:
                spot.value[int(part)] = value
            else:
                above, spot = spot, spot.value[int(part)]
            continue
        if spot.value is None or (isinstance(spot.value, dict) and not spot.value and index == 0):
            spot.value = {}
        if not isinstance(spot.value, dict):
            beside = above.value if isinstance(above.value, dict) else {}
            fix = f"set {'.'.join([*parts[: index - 1], part])}" if part in beside else f"set {here} itself"
            problems.append(Problem(f"{here} is {shown(spot.value)}, it has no fields", fix, source))
            return
        if last:
            spot.value[part] = value
        else:
            above, spot = spot, spot.value.setdefault(part, Node({}, source))
