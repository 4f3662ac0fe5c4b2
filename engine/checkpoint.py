"""Training checkpoints: safetensors and JSON under a manifest, written beside and renamed, verified when read.

    checkpoint/step-00000200/tensors.safetensors   weights that train, optimizer moments
                             state.json            where training stands
                             manifest.json         sizes and SHA-256 of the two, and of the manifest itself

A kill at any moment leaves the last complete one. safetensors does not notice flipped bits; the manifest does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from macpo.engine.errors import DataError, IntegrityError, MacpoError
from macpo.engine.faults import point
from macpo.engine.files import (
    explain,
    explained,
    fsync_dir,
    fsync_file,
    read_json,
    remove_tree,
    require_free,
    sha256,
    write_json,
)

SCHEMA = 1
KEEP = 2
_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint; tensors are on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = KEEP) -> Path:
    """Write `folder/step-XXXXXXXX` atomically, then drop all but the newest `keep`.

    Args:
        tensors: any device; written as they are.
        state: JSON-able.

    Raises:
        ResourceError: the disk is full; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_tree(temporary, folder)
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) + 65536
        require_free(folder, needed, "the checkpoint")
        temporary.mkdir()
        packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(packed, temporary / _TENSORS)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            cause = OSError(int(number[1]) if number else 0, str(error))
            raise explain(cause, temporary / _TENSORS, needed) from error
        fsync_file(temporary / _TENSORS)
        write_json(temporary / _STATE, {"step": step, **state})
        point("checkpoint-shards")
        write_json(temporary / _MANIFEST, _manifest(temporary, step))
        point("checkpoint-manifest")
        fsync_dir(temporary)
        remove_tree(final, folder)  # an unverifiable one of the same step, which `load_latest` had skipped
        os.rename(temporary, final)
        fsync_dir(folder)
        point("checkpoint-renamed")
        for old in _names(folder)[keep:]:
            remove_tree(folder / old, folder)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Clears what a kill left half-written.

    Raises:
        IntegrityError: there are checkpoints and none verifies, or one is of a newer schema.
    """
    if not folder.is_dir():
        return None
    for leftover in sorted(folder.glob("step-*.tmp")):
        remove_tree(leftover, folder)
    reasons = []
    for name in _names(folder):
        try:
            return _load(folder / name)
        except _Newer as error:
            raise IntegrityError(
                str(error), "upgrade macpo, or delete the folder to train again", file=str(folder)
            ) from None
        except (MacpoError, OSError, SafetensorError, _Damaged) as error:
            reasons.append(f"{name}: {error}")
            _log.warning("skipping checkpoint %s: %s", name, error)
    if reasons:
        raise IntegrityError(
            f"no checkpoint verifies ({'; '.join(reasons)})",
            "restore the folder from a copy, or delete it to train this stage again",
            file=str(folder),
        )
    return None


class _Damaged(Exception):
    """Why a checkpoint does not verify."""


class _Newer(Exception):
    """Written by a newer version."""


def _names(folder: Path) -> list[str]:
    """Complete checkpoints, newest first."""
    return sorted((path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in (_STATE, _TENSORS)
    }
    body: dict[str, Any] = {"schema": SCHEMA, "step": step, "files": files}
    return body | {"digest": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> Checkpoint:
    if not (path / _MANIFEST).is_file():
        raise _Damaged("it has no manifest")
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict):
        raise _Damaged("its manifest is not an object")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise _Newer(f"{path.name} has checkpoint schema {schema}, this version reads up to {SCHEMA}")
    if manifest.get("digest") != _digest(manifest):
        raise _Damaged("its manifest was changed")
    files = manifest["files"]
    extra = {entry.name for entry in path.iterdir()} - {*files, _MANIFEST}
    if extra:
        raise _Damaged(f"it holds a file that is not its own, {sorted(extra)[0]}")
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise _Damaged(f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise _Damaged(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        if sha256(file) != entry["sha256"]:
            raise _Damaged(f"{name} does not have its SHA-256")
    state = read_json(path / _STATE)
    if not isinstance(state, dict):
        raise DataError("is not a JSON object", "delete the checkpoint", file=str(path / _STATE))
    return Checkpoint(int(manifest["step"]), load_file(path / _TENSORS), state, path)
