"""Broken and odd versions of good files, each a function of a random generator alone."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

_BIG, _DEEP, _NAN = "@big@", "@deep@", "@nan@"
_RAW = {_BIG: "9" * 5000, _DEEP: "[" * 5_000 + "]" * 5_000, _NAN: "NaN"}
"""Texts in a tree that become what a tree cannot hold: a number of 5,000 digits, deep nesting, no number at all."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, 10**6, 10**9, 2**31, 2**63, 10**30, _BIG, _DEEP, _NAN,
    "", " ", "a", "0", "-1", "true", "None", "x" * 300, "x" * 20_000, "~nobody/x", "~", "../../etc/passwd", "/", "\0",
    "\x1b[31m\nerror: forged", "\u202egnp.exe", "\u2028", "é", "\U0001f600", "{{", "{% for x in y %}", "!!python/x",
    "NaN", "1e999", "*a", "&a", [], {}, [[]], [None], [0, 0], [-1, -1], {"": None}, {"a": {"b": {"c": []}}},
)  # fmt: skip
_PIECES = (
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n" * 100, b"\\ud800", b"\\u0000", b"[" * 5000,
    b"{" * 300, b'{"a":' * 3000, b"9" * 5000, b"-", b"NaN", b"1e999", b'"', b"'", b"\\", b",", b":", b"\x1b[0m",
    "\u2028\u202e".encode(), b"&a *a", b"<<: ", b"!!python/object:x ", b"\x1f\x8b",
)  # fmt: skip

_MAX_BYTES = 4 * 2**20
"""Largest file that is made: what is slow in proportion to its size is no finding."""

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def of_bytes(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Flipped bits, other bytes, cuts, doubled parts, splices of another file, and pieces that parsers dislike."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at, end = _span(data, draw)
        match draw.randrange(8):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[min(at, len(data) - 1)] = draw.choice((0, 255, 127, 10, 34, draw.randrange(256)))
            case 2:
                del data[at:]
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at : min(end, at + _MAX_BYTES // 50)] * draw.choice((1, 2, 50))
            case 5:
                data[at:at] = draw.choice(_PIECES)
            case 6:
                data[at:end] = draw.choice(_PIECES)
            case _:
                other = draw.choice(others)
                start, stop = _span(other, draw)
                data[at:end] = other[start:stop]
        del data[_MAX_BYTES:]
    return bytes(data)


def _span(data: bytes | bytearray, draw: random.Random) -> tuple[int, int]:
    at = draw.randrange(len(data) + 1)
    if draw.random() < 0.3:  # headers are at the beginning
        at = min(at, draw.randrange(64))
    return at, min(len(data), at + draw.choice((1, 2, 8, 64, draw.randrange(len(data) + 1))))


def of_tree(tree: Any, draw: random.Random) -> Any:
    """The JSON value with other types, values and keys at some of its places; `written` writes what it returns."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places([tree]))
        if not places:
            return tree
        holder, key = draw.choice(places)
        if holder is None:
            continue
        match draw.randrange(8):
            case 0 | 1 | 2 | 3:
                holder[key] = json.loads(json.dumps(draw.choice(_VALUES)))  # a container of its own
            case 4:
                del holder[key]
            case 5:
                other, name = draw.choice(places)
                holder[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
            case 6 if isinstance(holder, dict):
                holder[str(draw.choice(_VALUES))[:1000]] = holder.pop(key)
            case _:
                value = holder[key]
                many = 1000 if len(str(value)) < 100 else 3
                holder[key] = [value] * draw.choice((1, 2, many)) if draw.random() < 0.5 else {"value": value}
        if draw.random() < 0.02:
            return draw.choice(_VALUES)
    return tree


def _keys(holder: Any) -> Any:
    return holder.keys() if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below a value that is in a list of its own."""
    stack = list(value)
    while stack:
        holder = stack.pop()
        if isinstance(holder, dict | list):
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, child in list(items)[:200]:
                yield holder, key
                stack.append(child)


def written(tree: Any, indent: int | None = None) -> bytes:
    """JSON, with what stands for more than JSON can say in its place."""
    text = json.dumps(tree, ensure_ascii=False, indent=indent)
    if len(text) > _MAX_BYTES:
        text = text[: 2**16]
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def of_json(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    return written(of_tree(json.loads(raw), draw)) if draw.random() < 0.75 else of_bytes(raw, draw, others)


def of_jsonl(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    if draw.random() < 0.3:
        return of_bytes(raw, draw, others)
    rows = [json.loads(line) for line in raw.splitlines()]
    at = draw.randrange(len(rows))
    return b"\n".join(written(of_tree(row, draw) if i == at else row) for i, row in enumerate(rows)) + b"\n"


def of_yaml(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """A recipe as the JSON that is YAML too, changed as a tree; or its lines and bytes changed."""
    if draw.random() < 0.7:
        return written(of_tree(_plain(raw), draw), indent=1)
    lines = raw.splitlines(keepends=True)
    if draw.random() < 0.5:
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(lines))
            lines[at : at + 1] = draw.choice(
                ([], [lines[at]] * 2, [b"  " + lines[at]], [draw.choice(lines), lines[at]])
            )
            lines = lines or [b"\n"]
        return b"".join(lines)
    return of_bytes(raw, draw, others)


@functools.lru_cache
def _plain(raw: bytes) -> Any:
    return yaml.safe_load(raw)


def of_safetensors(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """The header changed as a tree under its right length, one flipped bit of it, or the bytes of the file."""
    length = int.from_bytes(raw[:8], "little")
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    if draw.random() < 0.6:
        header = written(of_tree(json.loads(header), draw))
        return len(header).to_bytes(8, "little") + header + rest
    if draw.random() < 0.5:
        flipped = bytearray(raw)
        flipped[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    return of_bytes(raw, draw, others)


def of_parquet(raw: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Another table of changed rows, where Arrow can hold them; else the bytes of the file."""
    if draw.random() < 0.3:
        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
        try:
            table = pyarrow.Table.from_pylist([of_tree(row, draw) for row in rows])
            out = io.BytesIO()
            pyarrow.parquet.write_table(table, out)
            return out.getvalue()
        except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
            pass  # no type holds them
    return of_bytes(raw, draw, others)
