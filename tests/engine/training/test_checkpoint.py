"""Checkpoints: what was written comes back, whole or in parts, and what was damaged is skipped with a reason."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked
from safetensors.torch import load_file
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError, ResourceError
from macpo.engine.training import checkpoint, shards
from macpo.engine.training.checkpoint import Checkpoint
from macpo.engine.training.shards import Box

ONE = World()
SHARD = "shard-00001-of-00001.safetensors"
TENSORS = {
    "a": torch.arange(1000.0),
    "b": torch.ones(3, 5, dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "ids": torch.tensor([[1, -(2**60)]]),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
}


def save(folder: Path, step: int, state: dict[str, Any] | None = None, **changes: Any) -> Path:
    tensors = TENSORS | {"a": TENSORS["a"] + step}
    return checkpoint.save(folder, step, tensors, {"note": step} if state is None else state, world=ONE, **changes)


def load(folder: Path, like: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    found = checkpoint.load_latest(folder, world=ONE, like=TENSORS if like is None else like)
    assert found is not None
    return found


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        save(tmp_path / "checkpoint", step)
    return tmp_path / "checkpoint"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_and_two_are_kept(folder: Path) -> None:
    found = load(folder)
    assert found.step == 6 and found.state["note"] == 6 and found.layout == "1 rank"
    assert bits(found.tensors) == bits(TENSORS | {"a": TENSORS["a"] + 6})
    assert all(
        found.tensors[name].dtype == t.dtype and found.tensors[name].shape == t.shape for name, t in TENSORS.items()
    )
    assert names(folder) == ["step-00000004", "step-00000006"]
    assert names(folder / "step-00000006") == ["manifest.json", SHARD, "state.json"]
    assert checkpoint.load_latest(folder.parent / "none", world=ONE, like=TENSORS) is None


def test_the_file_is_plain_safetensors_and_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    file = folder / "step-00000006" / SHARD
    assert bits(load_file(file)) == {n: b for n, b in bits(TENSORS | {"a": TENSORS["a"] + 6}).items() if n != "none"}
    again = save(tmp_path / "again", 6)
    assert (again / SHARD).read_bytes() == file.read_bytes()
    assert (again / "manifest.json").read_bytes() == (folder / "step-00000006" / "manifest.json").read_bytes()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def edit(path: Path, digest: bool = False, **changes: Any) -> None:
    manifest = json.loads(path.read_text()) | changes
    if digest:
        manifest["digest"] = checkpoint._digest(manifest)
    path.write_text(json.dumps(manifest))


def forge(folder: Path, name: str) -> None:
    """A manifest that is whole and lists a file by this name instead of the shard."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder / "manifest.json", digest=True, files={name if n == SHARD else n: e for n, e in files.items()})


def lose_a_piece(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[SHARD]["pieces"].pop("b")
    edit(folder / "manifest.json", digest=True, files=files)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (lambda f: flip(f / SHARD), f"{SHARD} does not have its SHA-256"),
    "truncated": (lambda f: (f / SHARD).write_bytes(b"abc"), f"{SHARD} has 3 bytes"),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "linked": (lambda f: (f / SHARD).rename(f.parent / "x") and (f / SHARD).symlink_to(f.parent / "x"), "is missing"),
    "no-manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest"),
    "torn-manifest": (lambda f: (f / "manifest.json").write_text('{"schema": 2, '), "invalid JSON"),
    "odd-manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "lacks entries"),
    "edited-manifest": (lambda f: edit(f / "manifest.json", step=60), "manifest was changed"),
    "renamed": (lambda f: edit(f / "manifest.json", digest=True, step=5), "it is of step 5"),
    "stale-extra": (lambda f: (f / "shard-3.safetensors").write_bytes(b"x"), "not its own, shard-3.safetensors"),
    "outside": (lambda f: forge(f, "../step-00000002/" + SHARD), "strange files"),
    "uncovered": (lose_a_piece, "b has 0 of 15 elements"),
    "edited-state": (lambda f: (f / "state.json").write_text("{}"), "state.json has 2 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_skipped_and_none_left_is_an_error(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    damage(folder / "step-00000006")
    with caplog.at_level(logging.WARNING):
        found = load(folder)
    assert found.step == 4 and torch.equal(found.tensors["a"], TENSORS["a"] + 4)
    assert "skipping checkpoint step-00000006" in caplog.text and reason in caplog.text
    damage(folder / "step-00000004")
    with pytest.raises(IntegrityError, match="no checkpoint verifies") as caught:
        load(folder)
    assert caught.value.code == 5 and "Fix:" in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize(("schema", "said"), [(99, "upgrade macpo"), (1, "install the older macpo")])
def test_another_schema_says_what_to_install(folder: Path, schema: int, said: str) -> None:
    edit(folder / "step-00000006" / "manifest.json", schema=schema)
    with pytest.raises(IntegrityError, match=rf"schema {schema}, this version reads 2\..*{said}"):
        load(folder)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", [".metadata", "manifest.json", "state.json", SHARD])
def test_a_crafted_pickle_is_never_unpickled(folder: Path, tmp_path: Path, name: str) -> None:
    """DCP would unpickle `.metadata`; here it, and a pickle in place of any file, hashes put right, is only damage."""
    bomb, newest = pickle.dumps(_Bomb(tmp_path / "boom")), folder / "step-00000006"
    (newest / name).write_bytes(bomb)
    files = json.loads((folder / "step-00000004" / "manifest.json").read_text())["files"]
    if name in files:
        files[name] |= {"bytes": len(bomb), "sha256": shards.hashlib.sha256(bomb).hexdigest()}
        edit(newest / "manifest.json", digest=True, files=files)
    assert load(folder).step == 4 and not (tmp_path / "boom").exists()
    pickle.loads(bomb)
    assert (tmp_path / "boom").exists()  # it was a real one


def test_leftovers_are_cleared_and_a_damaged_one_can_be_written_again(folder: Path) -> None:
    shutil.copytree(folder / "step-00000006", folder / "step-00000008.tmp")
    shutil.copytree(folder / "step-00000006", folder / "step-00000002.old.tmp")
    flip(folder / "step-00000006" / SHARD)
    assert load(folder).step == 4 and names(folder) == ["step-00000004", "step-00000006"]
    save(folder, 6, {"note": "again"})
    assert load(folder).state["note"] == "again"
    flip(folder / "step-00000006" / SHARD)
    save(folder, 5)  # after going on from 4: the later one is known to be bad
    assert names(folder) == ["step-00000004", "step-00000005"]


def test_tensors_of_another_model_are_named(folder: Path) -> None:
    for like, said in (
        (TENSORS | {"a": torch.zeros(10)}, r"it has F32 \[1000\] for a, the model F32 \[10\]"),
        (TENSORS | {"c": torch.zeros(2)}, r"it has nothing for c, the model F32 \[2\]"),
        (TENSORS | {"b": torch.zeros(3, 5)}, r"it has BF16 \[3, 5\] for b, the model F32"),
        ({"a": TENSORS["a"]}, r"for b, the model nothing"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(folder, like)
    with pytest.raises(ConfigError, match=r"z is torch\.complex64"):
        checkpoint.save(folder, 8, {"z": torch.zeros(2, dtype=torch.complex64)}, {}, world=ONE)
    assert load(folder).step == 6


def test_a_disk_that_gives_back_other_bytes_keeps_the_older_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention runs only after what was written has been read back."""
    written = shards.write

    def decaying(path: Path, *arguments: Any) -> None:
        written(path, *arguments)
        flip(path)

    monkeypatch.setattr(checkpoint, "write", decaying)
    with pytest.raises(IntegrityError, match="the disk gives back other bytes"):
        save(folder, 8)
    assert names(folder) == ["step-00000004", "step-00000006"]


def test_a_full_disk_keeps_the_older_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        save(folder, 8)

    assert forked(fill) == 4
    said = capfd.readouterr().err
    assert "no space to write it" in said and "4,077 bytes needed" in said and "bytes free" in said
    assert names(folder) == ["step-00000004", "step-00000006"] and load(folder).step == 6


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("macpo.engine.files.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match=r"the checkpoint needs [\d,]+ bytes, 1,000 bytes free"):
        save(folder, 8)
    assert names(folder) == ["step-00000004", "step-00000006"]


KILLS = (
    *(("checkpoint-torn", 1, 6), ("checkpoint-shards", 1, 6), ("file-created", 1, 6), ("file-written", 2, 6)),
    *(
        ("file-renamed", 2, 6),
        ("checkpoint-manifest", 1, 6),
        ("checkpoint-renamed", 1, 8),
        ("set-aside", 1, 8),
    ),
)


def test_killed_anywhere_the_last_complete_one_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at every write point, inside the rename and inside retention; then a further save works."""
    for name, count, expected in KILLS:
        shutil.rmtree(folder)
        save(folder, 4)
        save(folder, 6)
        monkeypatch.setenv("MACPO_KILL_AT", f"{name}:{count}")
        assert forked(lambda: save(folder, 8)) == -signal.SIGKILL
        monkeypatch.delenv("MACPO_KILL_AT")
        assert load(folder).step == expected, name
        assert not [path for path in folder.rglob("*") if "tmp" in path.name], name
        save(folder, 8 if expected == 6 else 10)
        assert len(names(folder)) == 2


def test_killed_while_an_old_one_is_half_deleted(folder: Path) -> None:
    def dying() -> None:
        unlink = os.unlink

        def last_words(path: Any, **words: Any) -> None:
            unlink(path, **words)
            os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = last_words
        save(folder, 8)

    assert forked(dying) == -signal.SIGKILL
    assert load(folder).step == 8 and names(folder) == ["step-00000006", "step-00000008"]


# --- boxes: what a rank holds of a DTensor ---


class _Mesh:
    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.shape, self.coordinate = shape, coordinate

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate

    def size(self, axis: int) -> int:
        return self.shape[axis]


PLACED = {  # shape, mesh, placements: even, uneven, an empty rank, two axes on one dimension, FSDP over TP
    "rows": ((8, 3), (4,), [Shard(0)]),
    "uneven": ((7, 3), (4,), [Shard(0)]),
    "empty": ((2, 3), (4,), [Shard(0)]),
    "columns": ((3, 10), (4,), [Shard(1)]),
    "grid": ((6, 5), (2, 3), [Shard(0), Shard(1)]),
    "nested": ((9, 2), (2, 3), [Shard(0), Shard(0)]),
    "fsdp-tp": ((16, 2), (2, 4), [_StridedShard(0, split_factor=4), Shard(0)]),
    "fsdp-tp-uneven": ((11, 2), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "fsdp-tp-other": ((6, 10), (2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("kind", PLACED)
def test_a_box_is_where_torch_puts_the_shard(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, mesh_shape, placements = PLACED[kind]
    covered = torch.zeros(shape, dtype=torch.int64)
    monkeypatch.setattr(shards, "DTensor", _Placed)
    for coordinate in torch.cartesian_prod(*(torch.arange(n) for n in mesh_shape)).reshape(-1, len(mesh_shape)):
        at = tuple(coordinate.tolist())
        size, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, list(at), placements)
        box = shards.box_of("t", _Placed(shape, _Mesh(mesh_shape, at), placements, size))  # type: ignore[arg-type]
        assert box.shape == tuple(size)
        if box.num_elements:
            assert box.start == tuple(offset)
            covered[tuple(slice(b, b + n) for b, n in zip(box.start, box.shape, strict=True))] += 1
    assert (covered == 1).all()


class _Placed:
    """As much of a DTensor as `box_of` looks at, for meshes larger than this machine."""

    def __init__(self, shape: Any, mesh: _Mesh, placements: Any, local: Any) -> None:
        self.shape, self.device_mesh, self.placements, self._local = torch.Size(shape), mesh, placements, local

    def dim(self) -> int:
        return len(self.shape)

    def detach(self) -> _Placed:
        return self

    def to_local(self) -> torch.Tensor:
        return torch.empty(self._local)


def test_a_part_that_is_no_box_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "DTensor", _Placed)
    strided = _Placed((8, 2), _Mesh((2,), (0,)), [_StridedShard(0, split_factor=2)], (4, 2))
    with pytest.raises(ConfigError, match="a part of it is no box"):
        shards.box_of("t", strided)  # type: ignore[arg-type]


def test_checksums_see_every_byte_and_not_where_it_lies() -> None:
    """Parts of buffers at odd offsets, sizes that eight does not divide, a scalar."""
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        for size in (1, 7, 16, 33):
            buffer = torch.arange(100).to(dtype)
            parts = [buffer[5 : 5 + size], buffer[5 : 5 + size].clone(), buffer[5 : 5 + size].clone()]
            parts[2][size // 2] += 1
            same, copy, other = shards._checksums({str(k): part for k, part in enumerate(parts)})
            assert same == copy != other, (dtype, size)
    assert shards._checksums({"x": torch.tensor(1.5)}) != shards._checksums({"x": torch.tensor(2.5)})


def test_overlaps() -> None:
    box = Box((2, 0), (4, 3))
    assert box.overlap(Box((0, 1), (3, 5))) == Box((2, 1), (1, 2))
    assert box.slices(Box((2, 1), (1, 2))) == (slice(0, 1), slice(1, 3))
    assert box.overlap(Box((6, 0), (1, 3))) is None and box.overlap(Box((0, 3), (9, 1))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
