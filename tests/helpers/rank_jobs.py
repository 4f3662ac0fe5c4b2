"""Training on two forked ranks, for the tests of faults."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import ranks
from torch import Tensor
from training import run_sft, weights

from macpo.engine.config import ParallelSettings
from macpo.engine.console import run_cli
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.world import World
from macpo.engine.models.policy import PolicyModule
from macpo.engine.processes import StopFlag
from macpo.engine.training.objectives import Objective, sft

SHARD = ParallelSettings(sharding="shard")
Job = Callable[[Path, World], PolicyModule]


def small(workdir: Path, world: World, **options: Any) -> PolicyModule:
    """6 steps, 3 an epoch, a checkpoint every second one."""
    return run_sft(workdir, world=world, **options)[0]


def trained(workdir: Path, job: Job = small) -> bytes:
    """metrics.jsonl and all weights after two ranks have brought the stage to its end; both must hold the same."""

    def body(world: World) -> None:
        flat = torch.cat([t.flatten() for t in weights(job(workdir, world)).values()])
        (workdir / f"weights-{world.rank}").write_bytes(flat.numpy().tobytes())

    workdir.mkdir(parents=True, exist_ok=True)
    assert ranks(2, body) == [0, 0]
    found = [(workdir / f"weights-{rank}").read_bytes() for rank in (0, 1)]
    assert found[0] == found[1]
    return (workdir / "metrics.jsonl").read_bytes() + found[0]


def flat(content: bytes) -> Tensor:
    """The weights of `trained`."""
    return torch.frombuffer(bytearray(content[content.rindex(b"}\n") + 2 :]), dtype=torch.float32)


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (workdir / "checkpoint").glob("step-????????"))


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


class Noted(Objective):
    """SFT that writes down which groups it saw, in a file of this rank; what the step's loss is made of."""

    metrics: tuple[str, ...] = ()
    fingerprint = "sft"

    def __init__(self, file: Path) -> None:
        self.inner, self.file = sft(), file

    def check(self, groups: Any) -> None: ...

    def size(self, group: Any) -> int:
        return self.inner.size(group)

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        with self.file.open("a") as file:
            file.write(json.dumps([total, *batch.groups]) + "\n")
        return self.inner(policy, batch, total)


def cli(function: Callable[[World, StopFlag], object]) -> Callable[[World], None]:
    """A rank's body that ends as a command ends: the message on stderr and the exit code."""

    def body(world: World) -> None:
        with StopFlag(quiet=True) as stop:
            code = run_cli(lambda: function(world, stop))
        os._exit(code)

    return body


def slowly(stop: StopFlag, mark: Path, seconds: float = 0.05) -> Callable[[], bool]:
    """Asked once a step: takes its time, and leaves a mark so that the signal comes in the middle."""

    def asked() -> bool:
        with mark.open("a") as file:
            file.write("x")
        time.sleep(seconds)
        return stop.requested

    return asked
