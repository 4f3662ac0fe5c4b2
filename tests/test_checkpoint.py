"""Checkpoints: what was written comes back, and what was damaged is skipped with a reason or refused."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import forked

from macpo.engine import checkpoint
from macpo.engine.errors import IntegrityError

TENSORS = {"a": torch.arange(1000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        checkpoint.save(tmp_path / "checkpoint", step, TENSORS | {"a": TENSORS["a"] + step}, {"note": step})
    return tmp_path / "checkpoint"


def test_the_newest_comes_back_and_two_are_kept(folder: Path) -> None:
    found = checkpoint.load_latest(folder)
    assert found is not None and found.step == 6 and found.state["note"] == 6
    assert torch.equal(found.tensors["a"], TENSORS["a"] + 6) and torch.equal(found.tensors["b"], TENSORS["b"])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    assert checkpoint.load_latest(folder.parent / "none") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def edit(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["step"] = 60
    path.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (lambda f: flip(f / "tensors.safetensors"), "does not have its SHA-256"),
    "truncated": (lambda f: (f / "tensors.safetensors").write_bytes(b"abc"), "has 3 bytes"),
    "missing": (lambda f: (f / "tensors.safetensors").unlink(), "is missing"),
    "no-manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest"),
    "torn-manifest": (lambda f: (f / "manifest.json").write_text('{"schema": 1, '), "invalid JSON"),
    "edited-manifest": (lambda f: edit(f / "manifest.json"), "manifest was changed"),
    "stale-extra": (lambda f: (f / "shard-3.safetensors").write_bytes(b"x"), "not its own, shard-3.safetensors"),
    "edited-state": (lambda f: (f / "state.json").write_text("{}"), "state.json has 2 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_skipped_and_none_left_is_an_error(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    damage(folder / "step-00000006")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_latest(folder)
    assert found is not None and found.step == 4
    assert "skipping checkpoint step-00000006" in caplog.text and reason in caplog.text
    damage(folder / "step-00000004")
    with pytest.raises(IntegrityError, match="no checkpoint verifies") as caught:
        checkpoint.load_latest(folder)
    assert caught.value.code == 5 and "Fix:" in str(caught.value) and reason in str(caught.value)


def test_a_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    path = folder / "step-00000006" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(IntegrityError, match=r"schema 99, this version reads up to 1\..*upgrade macpo"):
        checkpoint.load_latest(folder)


def test_leftovers_are_cleared_and_a_damaged_one_can_be_written_again(folder: Path) -> None:
    shutil.copytree(folder / "step-00000006", folder / "step-00000008.tmp")
    flip(folder / "step-00000006" / "tensors.safetensors")
    found = checkpoint.load_latest(folder)
    assert found is not None and found.step == 4 and not (folder / "step-00000008.tmp").exists()
    checkpoint.save(folder, 6, TENSORS, {"note": "again"})
    found = checkpoint.load_latest(folder)
    assert found is not None and found.state["note"] == "again"


def test_a_full_disk_keeps_the_older_one(folder: Path) -> None:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        checkpoint.save(folder, 8, TENSORS, {})

    assert forked(fill) == 4
    found = checkpoint.load_latest(folder)
    assert found is not None and found.step == 6
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
