"""The manifest of a finished stage: what it was made from, and the size and SHA-256 of every file in it.

Done means: the manifest is whole and the files are as it says. Timings and logs stand outside the hashed set.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import stat
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from macpo.engine import files
from macpo.engine.errors import DataError, IntegrityError, MacpoError
from macpo.engine.run.keys import SCHEMA, canonical, key_of

MANIFEST, RUNNING, TIMING = "manifest.json", "RUNNING", "timing.json"
STAGE_LOG, STEP_TIMES = "stage.log", "timing.jsonl"


def is_hashed(relative: str) -> bool:
    """Whether an output counts as part of the result: no timing, log or hidden file does."""
    parts = PurePosixPath(relative).parts
    return parts[0] not in (MANIFEST, RUNNING) and not any(
        name in (TIMING, STEP_TIMES) or name.startswith(".") or name.endswith(".log") for name in parts
    )


@dataclass(frozen=True)
class Manifest:
    """`files`: relative path -> {"bytes", "sha256"}; `digest`: hash over them.

    `created`, `mtime_ns`: not hashed; each is empty where it is absent or of another shape.
    """

    stage: str
    kind: str
    key: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    created: Mapping[str, str]
    mtime_ns: Mapping[str, int]

    @classmethod
    def of(
        cls,
        folder: Path,
        stage: str,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        scratch: Collection[str] = (),
    ) -> Manifest:
        """Sync and hash every file below the folder, but for the folders `scratch` in it.

        Raises: IntegrityError for links and special files.
        """
        found, mtimes = {}, {}
        for relative, path in _walk(folder, scratch):
            files.fsync_file(path)
            if is_hashed(relative):
                found[relative] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
                mtimes[relative] = path.stat().st_mtime_ns
        for base, _, _ in _folders(folder, scratch):
            files.fsync_dir(Path(base))
        key, settings = key_of(kind, settings, inputs), json.loads(canonical(settings))
        created = {**code_version(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        return cls(stage, kind, key, settings, inputs, found, digest_of(found), created, mtimes)

    def write(self, folder: Path) -> None:
        body = {
            "schema": SCHEMA,
            "stage": self.stage,
            "kind": self.kind,
            "key": self.key,
            "digest": self.digest,
            "settings": self.settings,
            "inputs": self.inputs,
            "files": self.files,
            "unhashed": {"created": self.created, "mtime_ns": self.mtime_ns},
        }
        files.write_json(folder / MANIFEST, body)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises: IntegrityError if it is missing, unreadable, edited or of a newer schema."""
        path = folder / MANIFEST
        if not path.is_file() or path.is_symlink():
            raise damaged(folder, "it has no manifest")
        try:
            body = files.read_json(path)
            schema = body["schema"]
            if schema not in (1, SCHEMA):
                raise _newer(path, schema)
            names = ("stage", "kind", "key", "settings", "inputs", "files", "digest")
            created, stamps = _unhashed(body.get("unhashed"))
            manifest = cls(**{name: body[name] for name in names}, created=created, mtime_ns=stamps)
            whole = manifest.key == key_of(manifest.kind, manifest.settings, manifest.inputs, schema=schema)
            whole = whole and manifest.digest == digest_of(manifest.files)
            whole = whole and all(_is_entry(*each) for each in manifest.files.items())
            whole = whole and isinstance(manifest.settings, dict) and isinstance(manifest.inputs, dict)
        except DataError as error:
            raise damaged(folder, f"its manifest is unreadable: {error.problems[0].message}") from None
        except (KeyError, TypeError, AttributeError, ValueError):
            raise damaged(folder, "its manifest lacks entries") from None
        if not whole:
            raise damaged(folder, "its manifest was edited")
        return manifest if schema == SCHEMA else manifest._of_schema_2()

    def _of_schema_2(self) -> Manifest:
        """A manifest of schema 1 as schema 2 says the same: the kind is the function's name, without its module."""
        kind = self.kind.rpartition(".")[2]
        return replace(self, kind=kind, key=key_of(kind, self.settings, self.inputs))

    def verify(self, folder: Path, *, full: bool, scratch: Collection[str] = ()) -> None:
        """Compares the files with the manifest: every hash if `full`, else hashes only where the time stamp differs.

        `scratch`: folders of a stage that was killed while it committed, which are not part of it.

        Raises: IntegrityError that names the file and says what to do.
        """
        for relative, entry in self.files.items():
            path = folder / relative
            try:
                info = path.lstat()
            except OSError:
                raise damaged(folder, f"{relative} is missing") from None
            if not stat.S_ISREG(info.st_mode):
                raise damaged(folder, f"{relative} is not a regular file")
            if info.st_size != entry["bytes"]:
                raise damaged(folder, f"{relative} has {info.st_size:,} bytes instead of {entry['bytes']:,}")
            fresh = not full and info.st_mtime_ns == self.mtime_ns.get(relative)
            if not fresh and files.sha256(path) != entry["sha256"]:
                raise damaged(folder, f"the content of {relative} was changed")
        if full:
            for relative, _ in _walk(folder, scratch):
                if is_hashed(relative) and relative not in self.files:
                    raise damaged(folder, f"{relative} does not belong to it", f"delete {folder / relative}")


def unchanged(folder: Path, relative: str) -> Path:
    """The path of a finished stage's file, for readers that show what it holds.

    Raises: IntegrityError if the manifest knows the file with another content; a manifest that says nothing of it, or
    cannot be read, is left to `verify`.
    """
    path = folder / relative
    try:
        known = files.read_json(folder / MANIFEST)["files"][relative]["sha256"]
    except (OSError, MacpoError, KeyError, TypeError):
        return path
    if path.is_file() and files.sha256(path) != known:
        raise damaged(folder, f"the content of {relative} was changed")
    return path


def damaged(folder: Path, what: str, fix: str = "") -> IntegrityError:
    """The error for a finished stage that no longer verifies; `--from` takes the stage's name."""
    name = folder.name.partition("-")[2] or folder.name
    return IntegrityError(
        f"the finished stage is damaged: {what}", fix or f"delete {folder} or run with --from {name}", file=str(folder)
    )


def digest_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash for all hashed outputs."""
    return hashlib.sha256(canonical(found).encode()).hexdigest()


def _newer(path: Path, schema: object) -> IntegrityError:
    return IntegrityError(
        f"the manifest has schema {schema}, this version of macpo reads {SCHEMA}",
        "upgrade macpo, or use a new run folder",
        file=str(path),
    )


def _is_entry(relative: str, entry: Any) -> bool:
    """Whether a manifest can name the file so."""
    path = PurePosixPath(relative)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)


def _unhashed(found: Any) -> tuple[dict[str, str], dict[str, int]]:
    """`created` and `mtime_ns` of a manifest, whose absence or other shape costs a warning or a hash and no more."""
    parts = found if isinstance(found, Mapping) else {}
    created, stamps = parts.get("created"), parts.get("mtime_ns")
    texts = {k: v for k, v in created.items() if isinstance(v, str)} if isinstance(created, Mapping) else {}
    return texts, dict(stamps) if isinstance(stamps, Mapping) else {}


def _folders(folder: Path, scratch: Collection[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without the folders `scratch` directly in the folder."""
    for base, folders, names in os.walk(folder):
        if base == str(folder):
            folders[:] = [name for name in folders if name not in scratch]
        yield base, folders, names


def _walk(folder: Path, scratch: Collection[str] = ()) -> list[tuple[str, Path]]:
    """(relative path, path) of every file below but for `scratch`, sorted; links and special files are refused.

    Timings, logs and hidden files that are neither are left out.
    """
    found = []
    for base, folders, names in _folders(folder, scratch):
        for name in [*names, *(each for each in folders if (Path(base) / each).is_symlink())]:
            path = Path(base) / name
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISREG(path.lstat().st_mode):
                found.append((relative, path))
            elif is_hashed(relative):
                raise IntegrityError("a stage's output is not a regular file", "write plain files", file=str(path))
    return sorted(found)


@functools.cache
def code_version() -> dict[str, str]:
    """The package's version and, from a source checkout, its commit."""
    here = Path(__file__).resolve()
    try:
        version = importlib.metadata.version("macpo")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    commit = ""
    try:
        top = _git(here.parent, "rev-parse", "--show-toplevel")
        if Path(top) / "engine" / "run" / here.name == here:  # not some other repository that a venv lies in
            commit = _git(here.parent, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        commit = ""  # no git or no repository: an installed package, its version says enough
    return {"version": version, "commit": commit}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
