"""The key of a stage: one hash of everything its outputs depend on, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from macpo.engine.errors import shown

SCHEMA = 2
"""Version of keys and manifests; raise it when either changes its meaning.

1: `kind` was the dotted path of the stage's function, so moving the function made every finished run stale.
2: `kind` is the stage's own name. Manifests of 1 are read (`manifest.Manifest.read`).
"""


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values. Raises: ValueError for what JSON cannot say exactly."""
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"not JSON: keys of {dict(value)!r} are not all text")
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list | tuple) else value


def key_of(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, schema: int = SCHEMA) -> str:
    """SHA-256 of what a stage's outputs depend on; `inputs`: alias -> digest of the input's outputs."""
    text = canonical({"schema": schema, "kind": kind, "settings": settings, "inputs": inputs})
    return hashlib.sha256(text.encode()).hexdigest()


UNKNOWN = "unknown: "
"""Beginning of a setting that stands for content which is not here to be looked at."""


def is_unknown(value: Any) -> bool:
    """Whether a setting stands for content which is not here to be looked at."""
    return isinstance(value, str) and value.startswith(UNKNOWN)


def filled(now: Any, recorded: Any) -> Any:
    """`now`, in which what is unknown is taken to be as it is recorded at the same place, absent where that is."""
    if is_unknown(now):
        return recorded if isinstance(recorded, str | int) else now
    if isinstance(now, dict) and isinstance(recorded, dict):
        known = {key: value for key, value in now.items() if key in recorded or not is_unknown(value)}
        return {key: filled(value, recorded.get(key)) for key, value in known.items()}
    return now


def changes(before: Any, now: Any, path: str = "") -> list[str]:
    """`field: old -> new` for every leaf that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            at = f"{path}.{key}" if path else key
            if key not in now:
                found.append(f"{at}: {shown(before[key])} -> removed")
            elif key not in before:
                found.append(f"{at}: new -> {shown(now[key])}")
            else:
                found += changes(before[key], now[key], at)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for i, (a, b) in enumerate(zip(before, now, strict=True)) for line in changes(a, b, f"{path}.{i}")]
    same = canonical(before) == canonical(now)
    return [] if same else [f"{path}: {shown(before)} -> {shown(now)}"]
