"""Chat templates rendered in this process, with a count of all that they do, so that none holds it up or fills it.

    template = Metered(source)  # Uncountable: rendered in a worker process instead
    text = template.render(values, budget)

A template is countable if it consists of the parts of jinja listed here, each of which takes time and memory in
proportion to the values it is given. Whatever makes a new value (a sum, a slice, a list, a filter, a call) is measured,
and every turn of a loop and every call of a macro costs what stands in its body; a rendering that spends more than its
budget is stopped. So no value is ever longer than the budget, and there are no more of them than it pays for.
Repetition, powers, formats, padding and the rest of jinja are not countable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from macpo.engine.data import jinja_environment

MAX_NODES = 6000
"""Size of the syntax tree; a long published template has about 1500."""
MAX_DEPTH = 32
"""Levels of nested values that are measured or written with an indent."""
_ELEMENT = 8  # what an element of a list costs beside its content
_COUNTABLE_NODES = """
    Template Output TemplateData Const Name NSRef Getattr Getitem Slice If For Assign AssignBlock Macro Call Keyword
    Filter Test Compare Operand And Or Not CondExpr Add Sub Div FloorDiv Mod Concat Neg Pos List Tuple Dict Pair Break
    Continue With Scope
"""
_COUNTABLE_METHODS = """
    strip lstrip rstrip startswith endswith removeprefix removesuffix split rsplit splitlines upper lower title
    capitalize find rfind index count isdigit isnumeric isalpha isspace items keys values get replace join
"""
_COUNTABLE_FILTERS = """
    trim upper lower capitalize title string safe length count first last default d list items dictsort reverse int
    float abs select reject selectattr rejectattr map tojson join replace
"""
_NODES, _METHODS, _FILTERS = (
    frozenset(words.split()) for words in (_COUNTABLE_NODES, _COUNTABLE_METHODS, _COUNTABLE_FILTERS)
)
_FUNCTIONS = frozenset({"raise_exception", "strftime_now", "namespace", "range"})
_NUMBERS = frozenset({"length", "count"})


class Uncountable(Exception):
    """The template has parts that are not countable."""


class Overspent(Exception):
    """The rendering did more than its budget allows, or took too long."""


class Metered:
    """A countable template. `tree` is its syntax tree with the counters in it.

    Raises:
        Uncountable: it is not countable, also where it is no jinja.
    """

    def __init__(self, source: str) -> None:
        self._meter = _Meter()
        made = _environment(self._meter)
        try:
            tree = made.parse(source)
            _check(tree)
            self.tree = _Counters().visit(tree)
            self._template = made.from_string(self.tree)
        except Uncountable:
            raise
        except Exception as problem:  # of the parser, which meets numbers of a million digits and the like
            raise Uncountable from problem

    def render(self, values: Mapping[str, Any], budget: int, seconds: float) -> str:
        """The text.

        Args:
            budget: characters that all values together may have, and units of loops and calls.
            seconds: wall-clock limit, looked at in every turn of a loop.

        Raises:
            Overspent: a limit is reached. Uncountable: a value of a type that is not measured. Whatever jinja raises.
        """
        self._meter.left, self._meter.deadline = budget, time.monotonic() + seconds
        return self._template.render(values)


class _Meter(threading.local):
    """What is left for this thread to spend; its methods are filters of the environment."""

    left, deadline = 0, 0.0

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Overspent

    @pass_context
    def grown(self, context: Context, value: Any) -> Any:
        self.left -= len(value) if type(value) is str else _size(value)
        if self.left < 0:
            raise Overspent
        return value

    @pass_context
    def turns(self, context: Context, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self.spend(cost)
            if time.monotonic() > self.deadline:
                raise Overspent
            yield item

    @pass_context
    def turn(self, context: Context, nothing: str, cost: int) -> str:
        self.spend(cost)
        if time.monotonic() > self.deadline:
            raise Overspent
        return nothing

    @pass_context
    def remainder(self, context: Context, value: Any, by: Any) -> Any:
        if isinstance(value, str | bytes):  # a format
            raise Uncountable
        return value % by

    @pass_context
    def replaced(self, context: Context, value: Any, old: Any, new: Any, count: Any = None) -> Any:
        if not isinstance(value, str) or not isinstance(old, str) or not isinstance(new, str):
            raise Uncountable
        places = value.count(old) if count is None or count < 0 else min(count, value.count(old))
        self.spend(len(value) + places * len(new))
        return value.replace(old, new, -1 if count is None else count)

    @pass_context
    def joined(self, context: Context, value: Any, d: Any = "", attribute: Any = None) -> Any:
        if attribute is not None or not isinstance(d, str):
            raise Uncountable
        parts = [str(self.grown(context, part)) for part in value]
        self.spend(len(parts) * (len(d) + _ELEMENT))
        return d.join(parts)

    @pass_context
    def method_join(self, context: Context, separator: Any, value: Any) -> Any:
        parts = list(value)
        if not isinstance(separator, str) or not all(isinstance(part, str) for part in parts):
            raise Uncountable
        return self.joined(context, parts, separator)

    @pass_context
    def json(self, context: Context, value: Any, **options: Any) -> str:
        self.spend(_size(value))
        return jinja_environment.tojson(value, **options)


def _environment(meter: _Meter) -> ImmutableSandboxedEnvironment:
    made = jinja_environment.environment()
    for name in ("grown", "turns", "turn", "remainder", "replaced", "joined", "method_join", "json"):
        made.filters[f"meter.{name}"] = getattr(meter, name)
    return made


def _size(value: Any, depth: int = 0) -> int:
    """Characters of a value as text, and something for each element.

    Raises:
        Uncountable: a value that may hold others which are not measured, or nesting deeper than MAX_DEPTH.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return 1 + (value.bit_length() >> 3)
    if isinstance(value, Namespace) or depth > MAX_DEPTH:
        raise Uncountable
    if isinstance(value, dict):
        return sum(2 * _ELEMENT + _size(key, depth + 1) + _size(part, depth + 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return sum(_ELEMENT + _size(part, depth + 1) for part in value)
    return 1 + _ELEMENT * (len(value) if hasattr(value, "__len__") else 0)


def _check(tree: nodes.Template) -> None:
    """Raise Uncountable for a part that is not countable."""
    found = [tree, *tree.find_all(nodes.Node)]
    macros = {node.name for node in found if isinstance(node, nodes.Macro)}
    called = {node.node.name for node in found if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name)}
    stored = {node.name for node in found if isinstance(node, nodes.Name) and node.ctx != "load"}
    if len(found) > MAX_NODES or called - macros - _FUNCTIONS or called & stored:
        raise Uncountable
    if not all(type(node).__name__ in _NODES and _is_countable(node) for node in found):
        raise Uncountable


def _is_countable(node: nodes.Node) -> bool:
    if isinstance(node, nodes.For):
        return not node.recursive
    if isinstance(node, nodes.AssignBlock):
        return node.filter is None
    if isinstance(node, nodes.Mod):
        return not (isinstance(node.left, nodes.Const) and isinstance(node.left.value, str))
    if isinstance(node, nodes.Call):
        named = isinstance(node.node, nodes.Name)
        method = isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS
        if not (named or method) or node.dyn_args is not None or node.dyn_kwargs is not None:
            return False
        return not (named and node.node.name == "namespace" and node.args)  # type: ignore[attr-defined]
    if isinstance(node, nodes.Filter):
        if node.name not in _FILTERS or node.dyn_args is not None or node.dyn_kwargs is not None:
            return False
        options = {keyword.key: keyword.value for keyword in node.kwargs}
        if node.name == "map":
            return not node.args and set(options) <= {"attribute", "default"}
        return node.name != "tojson" or (not node.args and all(_is_layout(*each) for each in options.items()))
    return True


def _is_layout(name: Any, value: Any) -> bool:
    """Whether an argument of `tojson` is a constant that makes little more text than there is."""
    if name == "separators":
        texts = value.items if isinstance(value, nodes.Tuple) else []
        return all(isinstance(text, nodes.Const) and len(str(text.value)) <= 4 for text in texts)
    if not isinstance(value, nodes.Const):
        return False
    return name in ("ensure_ascii", "sort_keys") or (name == "indent" and value.value in (None, *range(9)))


class _Counters(NodeTransformer):
    """Puts the counters into a countable tree."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        cost = _cost(node) if isinstance(node, nodes.For | nodes.Macro) else 0
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _metered("turns", node.iter, nodes.Const(cost))
        elif isinstance(node, nodes.Macro):
            node.body.insert(0, nodes.Output([_metered("turn", nodes.Const(""), nodes.Const(cost))]))
        elif isinstance(node, nodes.Output):
            node.nodes = [n if isinstance(n, nodes.TemplateData) else _grown(n) for n in node.nodes]
        elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.NSRef):
            node.node = _grown(node.node)
        elif isinstance(node, nodes.Mod):
            return _grown(_metered("remainder", node.left, node.right))
        elif isinstance(node, nodes.Call):
            return _counted_call(node)
        elif isinstance(node, nodes.Filter):
            node.name = {"replace": "meter.replaced", "join": "meter.joined", "tojson": "meter.json"}.get(
                node.name, node.name
            )
            return node if node.name in _NUMBERS else _grown(node)
        elif _makes_value(node):
            return _grown(node)
        return node


def _counted_call(node: nodes.Call) -> nodes.Node:
    if isinstance(node.node, nodes.Name) and node.node.name == "namespace":
        for keyword in node.kwargs:
            keyword.value = _grown(keyword.value)
        return node
    if isinstance(node.node, nodes.Getattr) and node.node.attr in ("replace", "join"):
        name = {"replace": "replaced", "join": "method_join"}[node.node.attr]
        return _grown(nodes.Filter(node.node.node, f"meter.{name}", node.args, node.kwargs, None, None))
    return _grown(node)


def _makes_value(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    if isinstance(node, nodes.List | nodes.Tuple):
        return getattr(node, "ctx", "load") == "load" and not all(isinstance(n, nodes.Const) for n in node.items)
    return isinstance(node, nodes.Add | nodes.Sub | nodes.Concat | nodes.Dict)


def _metered(name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f"meter.{name}", list(args), [], None, None)


def _grown(node: Any) -> nodes.Expr:
    is_measured = isinstance(node, nodes.Filter) and node.name == "meter.grown"
    return node if is_measured else _metered("grown", node)


def _cost(node: nodes.Node) -> int:
    """Nodes and characters of constants in a body: what one turn through it may do and write."""
    inside = list(node.find_all(nodes.Node))
    texts = (n.data if isinstance(n, nodes.TemplateData) else n.value for n in inside
             if isinstance(n, nodes.TemplateData | nodes.Const))  # fmt: skip
    return len(inside) + sum(len(text) for text in texts if isinstance(text, str))
