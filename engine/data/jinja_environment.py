"""The jinja environment that chat templates are written for: transformers' own, which this module does not import."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """`{% generation %}`: transformers' tag around what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"chat templates cannot store the attribute {name!r} on a namespace")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja's own escapes of HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def environment() -> ImmutableSandboxedEnvironment:
    """A new environment. There is no `strftime_now` in it: `with_settings` writes the run's date into a template."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=_raise, dict=_Dict(), namespace=_Namespace)
    return made


def values(messages: Sequence[Mapping[str, Any]], tools: Any, generation: bool, **others: Any) -> dict[str, Any]:
    """What a template is given, as transformers gives it: thoughts by all their names, parts that are null left out."""
    turns = []
    for message in messages:
        turn = {name: part for name, part in message.items() if part is not None}
        thought = next((turn[name] for name in THOUGHTS if name in turn), None)
        turns.append(turn if thought is None else {"thinking": thought, **turn, "reasoning_content": thought})
    return {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": generation, **others}
