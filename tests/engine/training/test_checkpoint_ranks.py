"""Checkpoints of several ranks: sharded and replicated tensors, other world sizes, damage, and ranks that die."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from architectures import model_of, some_groups
from forks import ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from macpo.engine.config import OptimSettings, ParallelSettings
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError, ResourceError, Stopped
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.training import checkpoint
from macpo.engine.training.objectives import sft
from macpo.engine.training.trainer import train

ONE = World()
WHOLE = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(30, dtype=torch.bfloat16).reshape(3, 10),
    "single": torch.tensor([3.5]),  # the second rank holds nothing of it
    "step": torch.tensor(9.0),
    "ids": torch.arange(6).reshape(2, 3) - 2**40,
}


def placed(world: World) -> dict[str, Tensor]:
    """WHOLE on two or three ranks: by rows, by columns, one element, a plain scalar, a copy on every rank."""
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        "rows": distribute_tensor(WHOLE["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(WHOLE["columns"], mesh, [Shard(1)]),
        "single": distribute_tensor(WHOLE["single"], mesh, [Shard(0)]),
        "step": WHOLE["step"].clone(),
        "ids": distribute_tensor(WHOLE["ids"], mesh, [Replicate()]),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, wanted[name]) and whole.dtype == wanted[name].dtype, name


def load(folder: Path, world: World, like: dict[str, Tensor] | None = None) -> checkpoint.Checkpoint:
    found = checkpoint.load_latest(folder, world=world, like=WHOLE if like is None else like)
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_any_ranks_wrote_any_ranks_read(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    checkpoint.save(one, 1, WHOLE, {"from": 1}, world=ONE)

    def body(world: World) -> None:
        tensors = placed(world)
        path = checkpoint.save(two, 2, tensors, {"from": 2}, world=world)
        assert sorted(p.name for p in path.iterdir()) == [
            "manifest.json", "shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors", "state.json",
        ]  # fmt: skip
        found = load(two, world, tensors)
        assert found.state == {"step": 2, "from": 2} and found.layout == checkpoint.layout_of(tensors, world)
        assert found.layout.startswith("2 ranks (2 ")
        for name, tensor in found.tensors.items():
            assert type(tensor) is type(tensors[name])
            if isinstance(tensor, DTensor):
                assert tensor.placements == tensors[name].placements  # type: ignore[attr-defined]
        same(found.tensors, WHOLE)
        same(load(two, world).tensors, WHOLE)  # sharded -> replicated
        same(load(one, world, tensors).tensors, WHOLE)  # 1 -> 2, whole -> sharded
        for shape, placements in (((2, 1), [Shard(0), Shard(1)]), ((1, 2), [Replicate(), Shard(0)])):
            mesh = init_device_mesh("cpu", shape)
            other = dict(WHOLE) | {"rows": distribute_tensor(torch.zeros(7, 5), mesh, placements)}
            same(load(two, world, other).tensors, WHOLE)

    assert ranks(2, body) == [0, 0]
    found = load(two, ONE)  # 2 -> 1
    assert found.step == 2
    same(found.tensors, WHOLE)
    sizes = [p.stat().st_size for p in sorted(found.path.glob("*.safetensors"))]
    held = [sum(t.numel() * t.element_size() for t in load_file(p).values()) for p in found.path.glob("*.safetensors")]
    assert sum(held) == sum(t.numel() * t.element_size() for t in WHOLE.values()) and min(held) > 80, (sizes, held)

    assert ranks(3, lambda world: same(load(two, world, placed(world)).tensors, WHOLE)) == [0, 0, 0]  # 2 -> 3

    # torch's own reader takes the shards
    theirs = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(found.path)), no_dist=True)
    same(theirs, WHOLE)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Fit:
    """AdamW on Net, sharded where there is a mesh; batch k is a function of k."""

    def __init__(self, sharded: bool) -> None:
        self.net = Net()
        if sharded:
            for module in (self.net.first, self.net.second, self.net):
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        self.adamw = torch.optim.AdamW(self.net.parameters(), lr=0.05, fused=True)

    def step(self, number: int) -> None:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
        self.adamw.zero_grad()
        self.net(x).square().mean().backward()
        self.adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, parameter in self.net.named_parameters():
            out[f"weight.{name}"] = parameter.detach()
            for moment, value in self.adamw.state[parameter].items():
                out[f"{moment}.{name}"] = value
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.net.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])
            for moment in list(self.adamw.state[parameter]):
                self.adamw.state[parameter][moment] = tensors[f"{moment}.{name}"]

    def whole(self) -> dict[str, Tensor]:
        return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in self.tensors().items()}


def test_fsdp2_goes_on_to_the_same_bits_and_on_one_rank_to_rounding(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"

    def body(world: World) -> None:
        fit = Fit(sharded=True)
        for step in range(6):
            if step == 3:
                checkpoint.save(folder, step, fit.tensors(), {}, world=world)
            fit.step(step)
        again = Fit(sharded=True)
        again.step(99)  # makes moments, which the checkpoint replaces
        again.load(load(folder, world, again.tensors()).tensors)
        for step in range(3, 6):
            again.step(step)
        want, got = fit.whole(), again.whole()
        assert all(torch.equal(want[name], got[name]) for name in want) and len(want) == 16
        if world.is_main:
            save_file(want, tmp_path / "want.safetensors")

    assert ranks(2, body) == [0, 0]
    single = Fit(sharded=False)
    single.step(99)
    single.load(load(folder, ONE, single.tensors()).tensors)
    for step in range(3, 6):
        single.step(step)
    for name, tensor in load_file(tmp_path / "want.safetensors").items():
        torch.testing.assert_close(single.whole()[name], tensor, rtol=1e-5, atol=1e-6)


SHARDS = [f"shard-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("missing middle", lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing"),
    ("stale extra", lambda f: shutil.copy(f / SHARDS[2], f / "shard-00004-of-00004.safetensors"), "not its own"),
    ("truncated", lambda f: os.truncate(f / SHARDS[2], 100), f"{SHARDS[2]} has 100 bytes"),
    ("flipped", lambda f: flip(f / SHARDS[2]), f"{SHARDS[2]} does not have its SHA-256"),  # rank 0 hashes it
    ("flipped elsewhere", lambda f: flip(f / SHARDS[1]), f"{SHARDS[1]} does not have its SHA-256"),  # rank 1 does
    ("another's", lambda f: shutil.copy(f.parent / "step-00000001" / SHARDS[1], f / SHARDS[1]), "SHA-256"),
)


def test_damaged_shards_are_named_by_all_ranks_and_the_previous_one_is_used(tmp_path: Path) -> None:
    folder, good = tmp_path / "checkpoint", tmp_path / "good"

    def write(world: World) -> None:
        tensors = placed(world)
        for step in (1, 2):
            same_sized = tensors | {"step": torch.tensor(float(step)), "rows": tensors["rows"] * step}
            checkpoint.save(good, step, same_sized, {}, world=world)

    assert ranks(3, write) == [0, 0, 0]

    def body(world: World) -> None:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger(checkpoint.__name__).addHandler(handler)
        like = placed(world)
        for kind, damage, reason in DAMAGE:
            world.barrier()
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(good, folder)
                damage(folder / "step-00000002")
            world.barrier()
            found = load(folder, world, like)
            assert found.step == 1 and found.tensors["step"] == 1, kind
            assert [reason in line and "step-00000002" in line for line in said] == [True] * world.is_main, (kind, said)
            said.clear()
        world.barrier()
        if world.is_main:
            (folder / "step-00000001" / SHARDS[1]).unlink()
        world.barrier()
        with pytest.raises(IntegrityError, match=r"no checkpoint verifies.*step-00000002.*step-00000001.*is missing"):
            load(folder, world, like)

    assert ranks(2, body) == [0, 0]


def test_ranks_agree_on_every_failure(tmp_path: Path) -> None:
    """A private disk, copies that drifted apart, a full disk on one rank only: the same error on both, no leftover."""
    folder = tmp_path / "checkpoint"

    def body(world: World) -> None:
        tensors = placed(world)
        checkpoint.save(folder, 2, tensors, {}, world=world)

        private = tmp_path / f"rank{world.rank}"
        with pytest.raises(ConfigError, match=r"ranks see different checkpoints.*shared disk"):
            checkpoint.save(private, 2, tensors, {}, world=world)
        (private / "step-00000002.tmp").mkdir(parents=True)  # a path that exists on both machines is still private
        with pytest.raises(ConfigError, match=r"ranks see different checkpoints.*shared disk"):
            checkpoint.save(private, 2, tensors, {}, world=world)
        shutil.rmtree(private)
        checkpoint.save(private, 2, WHOLE | {"step": torch.tensor(float(world.rank))}, {}, world=ONE)
        world.barrier()
        with pytest.raises(ConfigError, match=r"ranks see different checkpoints.*rank 1.*shared disk"):
            load(private, world, tensors)
        shutil.rmtree(tmp_path / "rank1", ignore_errors=True)
        world.barrier()
        with pytest.raises(ConfigError, match=r"ranks see different checkpoints.*rank 1"):
            load(private, world, tensors)

        drifted = tensors | {"step": torch.tensor(9.0 + world.rank)}
        with pytest.raises(IntegrityError, match="ranks 0 and 1 hold different values of step"):
            checkpoint.save(folder, 4, drifted, {}, world=world)
        partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
        with pytest.raises(ConfigError, match="cannot be saved"):
            checkpoint.save(folder, 4, {"p": partial}, {}, world=world)
        with pytest.raises(ConfigError, match=r"the model F32 \[7, 6\]"):
            load(folder, world, tensors | {"rows": torch.zeros(7, 6)})

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(ResourceError, match=r"no space to write it.*256 bytes needed, [\d,]+ bytes free") as caught:
            checkpoint.save(folder, 4, tensors, {}, world=world)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.relayed == (world.rank == 0)  # the rank that failed reports it
        world.barrier()  # rank 0 clears up
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]
        world.barrier()
        checkpoint.save(folder, 4, tensors, {}, world=world)
        assert load(folder, world, tensors).step == 4

    assert ranks(2, body) == [0, 0]


@pytest.mark.parametrize(
    ("point", "rank", "expected"),
    [
        ("checkpoint-torn", 1, 2),
        ("checkpoint-shards", 1, 2),  # its shard is complete, the manifest will never be
        ("checkpoint-shards", 0, 2),
        ("checkpoint-manifest", 0, 2),
        ("checkpoint-renamed", 0, 4),
        ("set-aside", 0, 4),
    ],
)
def test_a_rank_that_dies_fails_the_other_and_the_last_complete_one_is_used(
    tmp_path: Path, point: str, rank: int, expected: int
) -> None:
    def body(world: World) -> None:
        tensors = placed(world)
        checkpoint.save(tmp_path, 2, tensors, {}, world=world, keep=1)
        if world.rank == rank:
            os.environ["MACPO_KILL_AT"] = f"{point}:1"
        checkpoint.save(tmp_path, 4, tensors, {}, world=world, keep=1)

    wanted = [7, 7]
    wanted[rank] = -signal.SIGKILL
    assert ranks(2, body) == wanted
    found = load(tmp_path, ONE)
    assert found.step == expected
    same(found.tensors, WHOLE)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_manifest_of_many_ranks_stays_small(tmp_path: Path) -> None:
    """About 60 bytes a piece: every rank reads it whole."""
    tensors = {f"weight.model.layers.{k}.self_attn.q_proj.weight": torch.zeros(4, 4) for k in range(200)}
    path = checkpoint.save(tmp_path, 1, tensors, {}, world=ONE)
    body: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    assert len(json.dumps(body["files"])) < 200 * 100


# --- through the trainer: resumed on other ranks, sharded in other ways ---

DOCUMENTS = some_groups(num_responses=1, count=11)
# a rate at which Adam's division by tiny gradients does not blow up what rounding changes
SFT = OptimSettings(learning_rate=1e-4, epochs=2, batch=4, save_every_steps=2)


def sft_run(
    workdir: Path, world: World, parallel: ParallelSettings | None = None, stop_after: int | None = None
) -> dict[str, Tensor]:
    """Trains 6 steps, or fewer; returns the whole weights (on rank 0)."""
    policy = PolicyModule(model_of("llama"))
    if parallel is not None:
        policy = parallelize(policy, parallel, world)
    asked = iter(range(1, 100))
    should_stop = None if stop_after is None else lambda: next(asked) == stop_after
    train(policy, DOCUMENTS, sft(), SFT, seed=3, workdir=workdir, world=world, should_stop=should_stop)
    return policy.full_state()


def logged(workdir: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("step", "tokens", "lr")] for row in rows]


def test_a_stage_goes_on_on_other_ranks_sharded_or_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """2 sharded -> 1, 1 -> 2 sharded, sharded -> tensor-parallel -> replicated: the same order, weights to rounding."""
    shard, tensor = ParallelSettings(sharding="shard"), ParallelSettings(tensor=2)
    want = sft_run(tmp_path / "whole", ONE)

    def stopped(name: str, parallel: ParallelSettings | None, step: int) -> Callable[[World], None]:
        def body(world: World) -> None:
            with pytest.raises(Stopped):
                sft_run(tmp_path / name, world, parallel, stop_after=step)

        return body

    def finished(world: World) -> None:
        weights = sft_run(tmp_path / "up", world, shard)
        if world.is_main:
            save_file(weights, tmp_path / "up.safetensors")

    capfd.readouterr()
    assert ranks(2, stopped("down", shard, 3)) == [0, 0]
    assert "not bitwise" not in capfd.readouterr().err
    found = {"down": sft_run(tmp_path / "down", ONE)}
    said = capfd.readouterr().err
    assert (
        "note: resuming a checkpoint of 2 ranks (" in said
        and "with 1 rank: same sample order, results equal up to rounding, not bitwise" in said
    )

    stopped("up", None, 3)(ONE)
    assert ranks(2, finished) == [0, 0]
    found["up"] = load_file(tmp_path / "up.safetensors")

    assert ranks(2, stopped("across", shard, 2)) == [0, 0]
    assert ranks(2, stopped("across", tensor, 2)) == [0, 0]
    assert ranks(2, stopped("across", None, 1)) == [0, 0]
    assert capfd.readouterr().err.count("not bitwise") == 3
    found["across"] = sft_run(tmp_path / "across", ONE)

    for name, weights in found.items():
        assert logged(tmp_path / name) == logged(tmp_path / "whole")
        for key, tensor_ in weights.items():
            torch.testing.assert_close(tensor_, want[key], rtol=0, atol=1e-6)
