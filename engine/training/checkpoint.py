"""Training checkpoints: safetensors and JSON with a manifest, written to a temporary folder, verified when read.

    checkpoint/step-00000200/shard-00001-of-00002.safetensors   one rank's part of trained weights and moments
                             shard-00002-of-00002.safetensors
                             state.json                         training state
                             manifest.json                      every file's size and SHA-256, place of every part

Any number of ranks reads what any other number wrote. A kill at any moment leaves the last complete checkpoint.
safetensors notices neither flipped bits nor a missing shard; the manifest does. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from macpo.engine.distributed.agree import agreed
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, IntegrityError, MacpoError, PeerError, ResourceError
from macpo.engine.faults import point
from macpo.engine.files import (
    atomic_write,
    explain,
    explained,
    fsync_dir,
    read_json,
    require_free,
    sha256,
    write_json,
)
from macpo.engine.removal import is_folder, remove, remove_leftovers
from macpo.engine.training.shards import Box, Incomplete, Reader, code_of, read_back, share_of, write

SCHEMA = 2
KEEP = 2
_NAME = re.compile(r"step-(\d{8})")
_SHARD = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")
_STATE, _MANIFEST = "state.json", "manifest.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint: `tensors` are placed as requested, `layout` describes how they were saved."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    layout: str
    path: Path


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, world: World, keep: int = KEEP
) -> Path:
    """Write `folder/step-XXXXXXXX` atomically, then delete all but the newest `keep`; collective.

    Every rank writes its own part and reads it back; older checkpoints are deleted only after that.

    Args:
        tensors: the same names on every rank; plain tensors are whole on every rank, DTensors may be sharded.
        state: JSON-able; rank 0's is saved.

    Raises:
        ResourceError: the disk is full; older checkpoints are untouched.
        ConfigError: ranks do not share the disk, or a tensor cannot be saved.
        IntegrityError: copies of a tensor differ between ranks, or the disk returns other bytes than were written.
        PeerError: a rank died.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    mine = f"shard-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
    share = share_of(tensors, world)
    entry: dict[str, Any] = {}
    try:
        with agreed(world), explained(folder):
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                remove(temporary, folder)
                require_free(folder, share.total_bytes + 65536, "the checkpoint")
                temporary.mkdir()
        with agreed(world):
            if share.boxes:
                entry = _write_shard(temporary / mine, tensors, share.boxes, share.total_bytes)
                point("checkpoint-shards")
        entries = {name: found for name, found in world.gather([mine, entry]) if found}
        with agreed(world), explained(folder):
            if world.is_main:
                write_json(temporary / _STATE, {"step": step, **state})
                _write_manifest(temporary, step, layout_of(tensors, world), tensors, entries)
                _commit(temporary, final, keep)
    except PeerError:
        raise  # a rank that still lives may be writing
    except MacpoError:
        if world.is_main:
            with contextlib.suppress(OSError, MacpoError):  # a full disk gets its bytes back; the first error counts
                remove(temporary, folder)
        raise
    return final


def load_latest(folder: Path, *, world: World, like: Mapping[str, Tensor]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if there is none; collective.

    Rank 0 deletes half-written checkpoints and chooses one; the ranks share the hashing, and each reads its part.

    Args:
        like: names, shapes, dtypes, devices and placements of the tensors to return; not modified.

    Raises:
        IntegrityError: there are checkpoints and none verifies, or one has another schema.
        ConfigError: `like` has other tensors than were saved, or the ranks see different files.
    """
    names: list[str] = []
    with agreed(world), explained(folder):
        if world.is_main and folder.is_dir():
            _sweep(folder)
            names = _names(folder)
    names = world.broadcast(names)
    reasons = []
    for name in names:
        try:
            return _load(folder / name, world, like)
        except _Damaged as error:
            reasons.append(f"{name}: {error}")
            if world.is_main:
                _log.warning("skipping checkpoint %s: %s", name, error)
    with agreed(world):
        if reasons and world.is_main:
            fix = "restore the folder from a copy, or delete it to train this stage again"
            raise IntegrityError(f"no checkpoint verifies ({'; '.join(reasons)})", fix, file=folder)
    return None


def layout_of(tensors: Mapping[str, Tensor], world: World) -> str:
    """How many ranks hold the tensors, and how, in words; if the words are equal, resuming is bit-exact."""
    meshes = {
        "x".join(str(n) for n in t.device_mesh.shape) + " " + "/".join(map(str, t.placements))
        for t in tensors.values()
        if isinstance(t, DTensor)
    }
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    return f"{ranks} ({', '.join(sorted(meshes))})" if meshes else ranks


class _Damaged(Exception):
    """A checkpoint does not verify; raised on every rank alike."""


def _names(folder: Path) -> list[str]:
    """Complete checkpoints, newest first."""
    return sorted((path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _sweep(folder: Path) -> None:
    """Delete half-written and half-deleted checkpoints.

    A checkpoint gets its name once it is whole, and loses it before it is deleted. One without a manifest and without
    more of its files is what an older version, which did not rename it first, left of a delete.
    """
    remove_leftovers(folder)
    for path in sorted(folder.glob("step-*")):
        half_deleted = _NAME.fullmatch(path.name) is not None and is_folder(path) and _is_remnant(path)
        if half_deleted:
            _log.warning("%s has no manifest and not all of its other files: it was being deleted, and now is", path)
        if half_deleted or path.name.endswith(".tmp"):
            remove(path, folder)


def _is_remnant(path: Path) -> bool:
    found = {entry.name for entry in path.iterdir()}
    return _MANIFEST not in found and not (_STATE in found and any(map(_SHARD.fullmatch, found)))


def _write_shard(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box], needed: int) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise _not_shared(path.parent, "one does not see the folder that rank 0 made")
    try:
        write(path, tensors, boxes)
        return read_back(path, tensors, boxes)
    except OSError as error:
        raise explain(error, path, needed) from error


def _write_manifest(
    folder: Path, step: int, layout: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> None:
    for name, entry in entries.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
            raise _not_shared(folder, f"rank 0 does not see the {name} that another rank wrote")
    known = {name: {"dtype": code_of(name, t), "shape": list(t.shape)} for name, t in sorted(tensors.items())}
    state = {"bytes": (folder / _STATE).stat().st_size, "sha256": sha256(folder / _STATE)}
    body: dict[str, Any] = {"schema": SCHEMA, "step": step, "layout": layout, "tensors": known}
    body["files"] = {_STATE: state, **entries}
    # on one line, because there are thousands of pieces
    atomic_write(folder / _MANIFEST, json.dumps(body | {"digest": _digest(body)}) + "\n")
    point("checkpoint-manifest")


def _commit(temporary: Path, final: Path, keep: int) -> None:
    folder = final.parent
    fsync_dir(temporary)
    _Manifest.read(temporary, final.name)
    remove(final, folder)  # a damaged checkpoint of this step, which `load_latest` has skipped
    os.rename(temporary, final)
    fsync_dir(folder)
    point("checkpoint-renamed")
    names = _names(folder)
    # later steps did not verify, else training would have resumed from them
    kept = [name for name in names if name <= final.name][:keep]
    for old in set(names) - set(kept):
        remove(folder / old, folder)


def _not_shared(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"ranks see different checkpoints: {what}", "put the run folder on a shared disk", file=folder)


def _digest(body: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Manifest:
    step: int
    layout: str
    digest: str
    tensors: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]]
    pieces: Mapping[str, Mapping[str, Box]]

    @classmethod
    def read(cls, folder: Path, name: str) -> _Manifest:
        """Read and check the manifest, the folder's files and their sizes, and state.json, but not the shards' hashes.

        Raises: _Damaged; IntegrityError for another schema.
        """
        file = folder / _MANIFEST
        if not file.is_file() or file.is_symlink():
            raise _Damaged("it has no manifest")
        try:
            with explained(folder):
                body = read_json(file)
                if body["schema"] != SCHEMA:
                    raise _other_schema(folder, body["schema"])
                if body["digest"] != _digest(body):
                    raise _Damaged("its manifest was changed")
                shards = {each: entry for each, entry in body["files"].items() if each != _STATE}
                if not all(map(_SHARD.fullmatch, shards)):
                    raise _Damaged("its manifest names strange files")
                pieces = {
                    each: {tensor: Box(tuple(at), tuple(shape)) for tensor, (at, shape) in entry["pieces"].items()}
                    for each, entry in shards.items()
                }
                found = cls(body["step"], body["layout"], body["digest"], body["tensors"], body["files"], pieces)
                if name != f"step-{found.step:08d}":
                    raise _Damaged(f"it is of step {found.step}")
                found._check_files(folder)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise _Damaged("its manifest lacks entries") from None
        except (ConfigError, DataError, ResourceError) as error:
            raise _Damaged(str(error)) from None
        return found

    def _check_files(self, folder: Path) -> None:
        extra = {entry.name for entry in folder.iterdir()} - {*self.files, _MANIFEST}
        if extra:
            raise _Damaged(f"it holds a file that is not its own, {sorted(extra)[0]}")
        for name, entry in self.files.items():
            file = folder / name
            if not file.is_file() or file.is_symlink():
                raise _Damaged(f"{name} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise _Damaged(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        self.check_hash(folder, _STATE)

    def check_hash(self, folder: Path, name: str) -> None:
        if sha256(folder / name) != self.files[name]["sha256"]:
            raise _Damaged(f"{name} does not have its SHA-256")

    def check_fits(self, like: Mapping[str, Tensor], folder: Path) -> None:
        """Raise ConfigError, naming a tensor, if the saved tensors differ from `like`."""
        saved = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in self.tensors.items()}
        wanted = {name: f"{code_of(name, t)} {list(t.shape)}" for name, t in like.items()}
        for name in sorted({*wanted, *saved}):
            has, needs = (each.get(name, "nothing") for each in (saved, wanted))
            if has != needs:
                problem = f"the checkpoint belongs to other weights: it has {has} for {name}, the model {needs}"
                fix = "delete the folder to train again, or restore what it was started with"
                raise ConfigError(problem, fix, file=folder)


def _other_schema(folder: Path, schema: object) -> IntegrityError:
    newer = not isinstance(schema, int) or schema > SCHEMA
    problem = f"{folder.name} has checkpoint schema {schema}, this version reads {SCHEMA}"
    fix = f"{'upgrade' if newer else 'install the older'} macpo, or delete the folder to train again"
    return IntegrityError(problem, fix, file=folder.parent)


def _load(path: Path, world: World, like: Mapping[str, Tensor]) -> Checkpoint:
    """Load one checkpoint; collective. Raises _Damaged on all ranks."""
    manifest: _Manifest | None = None
    reason, digest = "", ""
    with agreed(world):
        if world.is_main:
            try:
                manifest = _Manifest.read(path, path.name)
                digest = manifest.digest
            except _Damaged as error:
                reason = str(error)
    reason, digest = world.broadcast([reason, digest])
    if reason:
        raise _Damaged(reason)
    with agreed(world):
        if not world.is_main:
            with contextlib.suppress(_Damaged):
                manifest = _Manifest.read(path, path.name)
        if manifest is None or manifest.digest != digest:
            raise _not_shared(path, f"rank {world.rank} does not see what rank 0 sees")
        manifest.check_fits(like, path)
    chosen = manifest

    def hashed() -> None:
        for file in sorted(chosen.pieces)[world.rank :: world.size]:
            chosen.check_hash(path, file)

    _everywhere(hashed, world)
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}

    def read() -> None:
        state.update(read_json(path / _STATE))
        with Reader(path, chosen.pieces) as reader:
            tensors.update({name: reader.like(name, wanted) for name, wanted in like.items()})

    _everywhere(read, world)
    return Checkpoint(chosen.step, tensors, state, chosen.layout, path)


def _everywhere(action: Callable[[], None], world: World) -> None:
    """Run `action` on every rank; raise _Damaged on all of them if it finds damage on any."""
    reason = ""
    with agreed(world):
        try:
            with explained():
                action()
        except (_Damaged, Incomplete, SafetensorError, DataError, ResourceError) as error:
            reason = str(error)
    for found in world.gather(reason):
        if found:
            raise _Damaged(found)
