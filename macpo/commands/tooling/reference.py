"""`macpo schema --markdown DIR`: every setting of every kind of recipe, as a page for each kind.

The pages are made from the JSON schema, which is made from the settings' own types, defaults, bounds and docstrings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from macpo.commands.tooling.schema import body
from macpo.engine.files import atomic_write
from macpo.engine.recipe import flow

Schema: TypeAlias = dict[str, Any]

MARK = "<!-- made by `macpo schema --markdown docs/recipe-reference`; do not edit -->"
INTRODUCTION = """\
Every setting of a recipe with `recipe: {kind}`. The dotted names are those that `--set` takes, as in
`--set {example}`; a 0 stands for any place in a list. `macpo check RECIPE --print-config` prints all
settings of a recipe of yours with the same explanations."""
EXAMPLES = {
    "macpo": "student_training.preference.beta=0.2",
    "sft": "training.epochs=2",
    "preference": "training.beta=0.2",
    "reward": "training.batch=32",
}


def write_pages(folder: Path) -> list[Path]:
    """Write a page for each kind of recipe into the folder, which is made; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kind, text in pages().items():
        found.append(folder / f"{kind}.md")
        atomic_write(found[-1], text)
    return found


def pages() -> dict[str, str]:
    """Kind of recipe -> its page, in Markdown."""
    schema = body()
    kinds = {case["if"]["properties"]["recipe"]["const"]: case["then"]["$ref"] for case in schema["allOf"]}
    return {kind: _Page(kind, schema["$defs"]).text(reference) for kind, reference in kinds.items()}


class _Page:
    """One page. A block that recurs is described once; later ones name it and what differs."""

    def __init__(self, kind: str, definitions: dict[str, Schema]) -> None:
        self.kind, self.definitions = kind, definitions
        self.described: dict[str, str] = {}  # definition -> path of the block that describes it
        self.defaults: dict[str, Any] = {}  # dotted name -> default, of every setting so far
        self.anchored: set[str] = set()

    def text(self, reference: str) -> str:
        introduction = INTRODUCTION.format(kind=self.kind, example=EXAMPLES[self.kind])
        lines = [MARK, "", f"# `recipe: {self.kind}`", "", introduction, ""]
        return "\n".join([*lines, *self.block("", _name(reference), {}, "")]) + "\n"

    def block(self, path: str, name: str, defaults: Schema, choice: str) -> Iterator[str]:
        """Lines of one block and of those inside it.

        Args:
            path: dotted name; "" for the recipe itself.
            name: the block's definition.
            defaults: defaults of this very block, where they differ from the definition's.
            choice: what tells it from its alternatives, such as `type: lora`.
        """
        definition = self.definitions[name]
        if path:
            anchors = self.anchor(path.removesuffix(".0")) + self.anchor(path)
            yield from ("", *([anchors, ""] if anchors else ()))
            yield from (f"## `{path}`" + (f" with `{choice}`" if choice else ""), "")
            if name in self.described:
                yield self.again(path, self.described[name], defaults)
                return
            yield from (_one_line(definition.get("description", "")), "")
        self.described[name] = path
        yield from ("| setting | value | default | meaning |", "| --- | --- | --- | --- |")
        fields = {_joined(path, key): (key, field) for key, field in definition["properties"].items()}
        for full, (key, field) in fields.items():
            default = defaults.get(key, _default(key, field, definition))
            self.defaults.setdefault(full, default)
            yield self.row(full, field, default)
        for full, (key, field) in fields.items():
            inside = list(self.blocks(full, field))
            given = defaults.get(key, field.get("default"))
            for part, inner in inside:
                if len(inside) > 1:  # alternatives; the default is of one of them
                    yield from self.block(part, inner, {}, _choice(self.definitions[inner]))
                else:
                    yield from self.block(part, inner, given if isinstance(given, dict) else {}, "")

    def again(self, path: str, first: str, defaults: Schema) -> str:
        """One line for a block like an earlier one, with the anchors of all its settings."""
        inside = [known for known in self.defaults if known.startswith(f"{first}.")]
        names = {path + known.removeprefix(first): self.defaults[known] for known in inside}
        anchors = "".join(map(self.anchor, names))
        other = [
            f"`{key}` {_code(value)}"
            for key, value in defaults.items()
            if not isinstance(value, dict) and value != self.defaults.get(f"{first}.{key}", value)
        ]
        self.defaults |= names | {_joined(path, key): value for key, value in defaults.items()}
        differ = f", with other defaults: {', '.join(other)}" if other else ""
        return f"{anchors}The settings of [`{first}`](#{first}){differ}."

    def anchor(self, path: str) -> str:
        """The anchor of a setting where the page does not have it yet."""
        if path in self.anchored:
            return ""
        self.anchored.add(path)
        return f'<a id="{path}"></a>'

    def row(self, path: str, field: Schema, default: Any) -> str:
        blocks = list(self.blocks(path, field))
        meaning = field.get("description") or (self.definitions[blocks[0][1]].get("description", "") if blocks else "")
        shown = "" if blocks and isinstance(default, dict) else default if default in _WORDS else _code(default)
        anchor = "" if blocks else self.anchor(path)  # that of a block stands at its own table
        cells = (f"{anchor}`{path}`", self.type(field, path), shown, _one_line(meaning))
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def blocks(self, path: str, field: Schema) -> Iterator[tuple[str, str]]:
        """(path, definition) of every block that a setting can hold."""
        if "$ref" in field:
            if "properties" in self.definitions[_name(field["$ref"])]:
                yield path, _name(field["$ref"])
            return
        for one in (*field.get("anyOf", ()), *field.get("oneOf", ())):
            yield from self.blocks(path, one)
        if "items" in field:
            yield from self.blocks(f"{path}.0", field["items"])

    def type(self, field: Schema, path: str) -> str:
        """The values that a setting takes, in words."""
        if choices := field.get("anyOf") or field.get("oneOf"):
            return " or ".join(dict.fromkeys(self.type(one, path) for one in choices))
        if "$ref" in field:
            name = _name(field["$ref"])
            return f"[block](#{path})" if "properties" in self.definitions[name] else "any value"
        if "enum" in field or "const" in field:
            return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
        kind = field.get("type")
        if kind == "array" and "items" in field:
            return f"list of {self.type(field['items'], f'{path}.0')}"
        if kind == "array":
            return f"list of {field['maxItems']} values, each {self.type(field['prefixItems'][0], path)}"
        if kind == "string" and field.get("format") == "date":
            return "date"
        return {"null": "`null`", "boolean": "`true`, `false`", "object": "mapping"}.get(kind or "") or _bounded(field)


_WORDS = ("**required**", "")


def _bounded(field: Schema) -> str:
    """A text or number with its bounds."""
    word = {"string": "text", "integer": "whole number", "number": "number"}[field["type"]]
    if "pattern" in field:
        return f"{word} of letters, digits, `-` and `_`, at most {field['maxLength']}"
    if {"minimum", "maximum"} <= field.keys():
        return f"{word} from {field['minimum']:g} to {field['maximum']:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:.10g}" for name, sign in signs.items() if name in field]
    return f"{word} {', '.join(bounds)}".rstrip()


def _default(key: str, field: Schema, definition: Schema) -> Any:
    if key in definition.get("required", ()):
        return "**required**"
    if "default" in field:
        return field["default"]
    return {} if field.get("type") == "object" or "$ref" in field else ""  # "": the meaning says what it depends on


def _choice(definition: Schema) -> str:
    """What tells a block from its alternatives: its first key with a single value."""
    for key, field in definition["properties"].items():
        if "const" in field:
            return f"{key}: {field['const']}"
    return ""


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _code(value: Any) -> str:
    return f"`{json.dumps(value) if isinstance(value, dict) else flow(value)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
