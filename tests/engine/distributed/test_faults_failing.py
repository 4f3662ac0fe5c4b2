"""Two gloo ranks that run out of disk, memory or patience, compute NaN, raise, hang, or find the folder taken."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from forks import ranks, start_ranks, wait
from rank_jobs import SHARD, Noted, flat, saved_steps, small, trained, until
from torch import Tensor
from training import (
    DPO,
    PAIRS,
    SFT,
    SLOW,
    rows,
    run_dpo,
    run_sft,
    stop_after,
    weights,
)

from macpo.engine.config import OptimSettings, ParallelSettings
from macpo.engine.console import run_cli
from macpo.engine.data.batches import BatchOrder
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed import watchdog
from macpo.engine.distributed.world import World
from macpo.engine.errors import MacpoError
from macpo.engine.files import read_json
from macpo.engine.models.policy import PolicyModule
from macpo.engine.processes import StopFlag
from macpo.engine.run.context import StageContext
from macpo.engine.run.runner import Runner
from macpo.engine.run.stages import Graph, Stage, StageWork

pytestmark = pytest.mark.usefixtures("no_idle_models")

# --- starved (26, 40) ---


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 cannot write its shard of the second checkpoint: both say so with the bytes, and the first one is used."""

    def body(world: World) -> None:
        asked = iter(range(1, 99))

        def starve() -> bool:
            if next(asked) == 3 and world.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            return False

        small(tmp_path, world, should_stop=starve)

    assert ranks(2, body) == [4, 4]
    said = capfd.readouterr().err
    assert re.search(r"no space to write it \(File too large\), [\d,]+ bytes needed, [\d,]+ bytes free", said), said
    assert saved_steps(tmp_path) == [2] and not list(tmp_path.rglob("*.tmp"))
    assert trained(tmp_path) == trained(tmp_path.with_name("clean"))


class Starved(Noted):
    """SFT on a device that holds no more than so many tokens."""

    def __init__(self, file: Path, tokens: int) -> None:
        super().__init__(file)
        self.tokens = tokens

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        if batch.num_tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(policy, batch, total)


def test_out_of_memory_on_one_rank_makes_all_of_them_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The smaller budget is that of both from the next step on, and of those that resume: as if it had been set."""
    slow = SFT.model_copy(update=SLOW)

    def starved(workdir: Path, world: World) -> PolicyModule:
        objective = Starved(workdir / f"seen-{world.rank}", 20 if world.rank == 1 else 1000)
        return run_sft(workdir, slow, world=world, objective=objective)[0]

    content = trained(tmp_path / "starved", starved)
    said = capfd.readouterr().err
    assert len(re.findall(r"note: step \d: out of memory on rank 1: micro-batches have at most \d+ tokens", said)) == 1
    (state,) = [read_json(path) for path in (tmp_path / "starved").glob("checkpoint/step-00000006/state.json")]
    assert state["microbatch_tokens"] == 12
    plain = trained(tmp_path / "plain", functools.partial(small, settings=slow))
    torch.testing.assert_close(flat(content), flat(plain), rtol=0, atol=1e-6)

    def stop_and_go(workdir: Path, world: World) -> PolicyModule:
        objective = Starved(workdir / f"seen-{world.rank}", 20 if world.rank == 1 else 1000)
        try:
            run_sft(workdir, slow, world=world, objective=objective, should_stop=stop_after(3))
        except MacpoError:
            objective.tokens = 1000  # nothing runs out any more, and still the budget stays
        return run_sft(workdir, slow, world=world, objective=objective)[0]

    assert trained(tmp_path / "again", stop_and_go) == content


def test_out_of_memory_in_a_sharded_micro_batch_starts_the_ranks_again(tmp_path: Path) -> None:
    """The other rank is inside the same forward: nothing can call it back, so both begin again with less."""
    slow = SFT.model_copy(update=SLOW)

    def body(workdir: Path, world: World) -> PolicyModule:
        objective = Starved(workdir / f"seen-{world.rank}", 20 if world.rank == 1 else 1000)
        return run_sft(workdir, slow, world=world, objective=objective, parallel=SHARD)[0]

    attempts = 0
    while (codes := ranks(2, functools.partial(body, tmp_path))) != [0, 0]:
        assert codes == [7, 76]
        attempts += 1
    assert attempts == 1
    plain = trained(tmp_path / "plain", functools.partial(small, settings=slow))
    torch.testing.assert_close(flat(trained(tmp_path, body)), flat(plain), rtol=0, atol=1e-6)


# --- numbers (28, 29) ---


@pytest.mark.parametrize("parallel", [None, SHARD], ids=["replicate", "shard"])
def test_a_nan_on_one_rank_stops_both_before_the_update(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], parallel: ParallelSettings | None
) -> None:
    # in the third step, after the checkpoint of the second
    poisoned = BatchOrder(len(PAIRS), DPO.batch, DPO.epochs, 3).order(0)[9]

    def body(world: World) -> None:
        asked: list[Tensor] = []

        def look() -> bool:
            asked.append(torch.cat([t.flatten() for t in weights(policies[0]).values()]))
            return False

        policies: list[PolicyModule] = []
        original = PolicyModule.trainable_parameters

        def watched(self: PolicyModule) -> Any:
            policies.append(self)
            return original(self)

        PolicyModule.trainable_parameters = watched  # type: ignore[method-assign]  # in a forked child only
        try:
            run_dpo(tmp_path, world=world, parallel=parallel, poison={poisoned: float("nan")}, should_stop=look)
        finally:
            after = torch.cat([t.flatten() for t in weights(policies[0]).values()])
            (tmp_path / f"same-{world.rank}").write_text(json.dumps([len(asked), torch.equal(after, asked[-1])]))

    assert ranks(2, body) == [6, 6]
    said = capfd.readouterr().err
    assert said.count("step 3: loss nan, gradient norm nan; groups whose own loss is not finite:") == 2
    assert said.count(f"not finite: pair-{poisoned};") == 2
    assert "last checkpoint: the one of step 2" in said
    assert [read_json(tmp_path / f"same-{rank}") for rank in (0, 1)] == [[3, True]] * 2
    assert saved_steps(tmp_path) == [2] and len(rows(tmp_path)) == 2


# --- failing, hanging, crowded (30, 31, 34) ---


class TrainStage(StageWork):
    """What a recipe's training stage does, with a rank that fails or hangs in its third step."""

    name = "train_stage"
    how: str

    def run(self, ctx: StageContext) -> None:
        asked = iter(range(1, 99))

        def ask() -> bool:
            if next(asked) == 3 and ctx.world.rank == 1:
                if self.how == "raise":
                    raise ZeroDivisionError("a bug")
                if self.how == "hang":
                    hang_here()
            return ctx.stop_requested()

        run_sft(ctx.dir, OptimSettings.model_validate(SFT), world=ctx.world, should_stop=ask)


def hang_here() -> None:
    time.sleep(60)


def staged(folder: Path, how: str) -> Callable[[World], None]:
    graph = Graph()
    graph.add(Stage("teach", TrainStage(how=how)))

    def body(world: World) -> None:
        os._exit(run_cli(Runner(folder, graph, world=world, log=lambda message: None).run))

    return body


def test_the_message_is_that_of_the_rank_that_raises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = ranks(2, staged(tmp_path / "run", "raise"))
    assert codes == [7, 1]  # `macpo run --ranks` makes one 7 of the two, with the message of rank 1 (test_launcher.py)
    said = capfd.readouterr().err
    assert "error: rank 1 failed in teach: ZeroDivisionError: a bug. Fix: see that rank's message." in said
    assert "Traceback" not in said


def test_a_rank_that_hangs_is_noticed_and_shows_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def body(world: World) -> None:
        watchdog.watch(4.0)
        staged(tmp_path / "run", "hang")(world)

    pids = start_ranks(2, body, timeout_s=4.0)
    began = time.monotonic()
    try:
        assert wait(pids[0]) == 7
        assert time.monotonic() - began < 15
        time.sleep(1.5)  # its own time is up a moment later
    finally:
        os.kill(pids[1], signal.SIGKILL)
        wait(pids[1])
    said = capfd.readouterr().err
    assert re.search(r"error: .*in stage teach: step 3: another rank failed or hangs, noticed in sum", said), said
    assert "Timeout (0:00:04.250000)!" in said and re.search(r"File .*, line \d+ in hang_here\n", said), said


def test_two_jobs_of_two_ranks_in_one_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second is refused by its rank 0 alone; killed, the first leaves a lock that is cleared."""
    folder = tmp_path / "run"

    def body(world: World) -> None:
        os._exit(run_cli(Runner(folder, toy_run.build_ranked({}), world=world).run))

    def slow(world: World) -> None:
        (tmp_path / f"there-{world.rank}").write_text("")
        with StopFlag():
            Runner._run_in_order = lambda self, executor: hang_here()  # type: ignore[method-assign, assignment]
            Runner(folder, toy_run.build_ranked({}), world=world).run()

    first = start_ranks(2, slow)
    until(lambda: (folder / ".lock").exists() and bool((folder / ".lock").read_text()))
    assert ranks(2, body) == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and f"in use by process {first[0]} on " in said
    for pid in first:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    assert (folder / ".lock").exists()
    assert ranks(2, body) == [0, 0]
    said = capfd.readouterr().err
    assert f"cleared the lock that process {first[0]} on " in said and not (folder / ".lock").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["01-shards", "02-more"]
