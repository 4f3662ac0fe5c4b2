"""Two gloo ranks that are killed or stopped in the middle of their work, and resume.

MACPO_KILLS=50 makes the test of random kills do fifty of them.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wave_job
from architectures import model_of
from forks import ranks, start_ranks, wait
from rank_jobs import SHARD, Noted, cli, saved_steps, slowly, small, trained, until
from training import (
    DOCUMENTS,
    PAIRS,
    SFT,
    SLOW,
    assert_same_training,
    rows,
    run_sft,
    spread,
    stop_after,
    weights,
)

from macpo.engine.config import ParallelSettings
from macpo.engine.data.batches import BatchOrder
from macpo.engine.distributed.world import World
from macpo.engine.errors import MacpoError
from macpo.engine.files import read_json
from macpo.engine.generation.split_model import split_policy
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(tmp_path_factory.mktemp("clean"))


# --- killed (20, 21, 23) ---

WRITE_POINTS = [
    *((name, count, rank) for name in ("checkpoint-torn", "checkpoint-shards") for count, rank in ((1, 0), (2, 1))),
    *((f"file-{what}", 4, 0) for what in ("created", "written", "synced", "renamed")),
    ("checkpoint-manifest", 2, 0),
    ("checkpoint-renamed", 1, 0),
    ("set-aside", 1, 0),
]


def test_one_rank_killed_at_every_write_point(clean: bytes, tmp_path: Path) -> None:
    """The other one fails fast; the same command then ends with the bits of a run that nobody disturbed."""

    def body(workdir: Path, point: str, victim: int, world: World) -> None:
        if world.rank == victim:
            os.environ["MACPO_KILL_AT"] = point
        small(workdir, world)

    for name, count, victim in WRITE_POINTS:
        workdir = tmp_path / f"{name}-{count}-{victim}"
        began = time.monotonic()
        codes = ranks(2, functools.partial(body, workdir, f"{name}:{count}", victim))
        assert (codes[victim], codes[1 - victim]) == (KILLED, 7), name
        assert time.monotonic() - began < 15, f"{name}: noticed by the timeout only"
        assert trained(workdir) == clean, name
        assert not list(workdir.rglob("*.tmp"))


def test_both_ranks_killed_at_random_times(clean: bytes, tmp_path: Path) -> None:
    """Again and again until a run has got to its end; no kill costs more than one interval between checkpoints."""
    wanted = int(os.environ.get("MACPO_KILLS", "4"))
    rng = random.Random(wanted)
    began = time.monotonic()
    assert ranks(2, functools.partial(small, tmp_path / "timed")) == [0, 0]
    whole = time.monotonic() - began
    kills, round_ = 0, 0
    while kills < wanted:
        workdir = tmp_path / str(round_)
        round_ += 1
        for _ in range(wanted - kills):
            pids = start_ranks(2, functools.partial(small, workdir))
            time.sleep(rng.uniform(0.0, whole))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            codes = [wait(pid) for pid in pids]
            if codes == [0, 0]:
                break
            kills += 1
            assert set(codes) <= {0, 7, KILLED}
            log = workdir / "metrics.jsonl"
            done = log.read_bytes().count(b"\n") if log.exists() else 0
            assert done - max(saved_steps(workdir), default=0) <= SFT.save_every_steps
        assert trained(workdir) == clean
        assert not list(workdir.rglob("*.tmp"))


# --- stopped (22) ---


@pytest.mark.parametrize(("number", "both"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_training_stops_at_the_same_step_on_all_ranks(clean: bytes, tmp_path: Path, number: int, both: bool) -> None:
    mark = tmp_path / "mark"
    body = cli(lambda world, stop: small(tmp_path, world, should_stop=slowly(stop, mark)))
    pids = start_ranks(2, body)
    until(lambda: mark.exists() and mark.stat().st_size >= 4)
    for pid in pids if both else pids[1:]:
        os.kill(pid, number)
    assert [wait(pid) for pid in pids] == [75, 75]
    assert len(rows(tmp_path)) == saved_steps(tmp_path)[-1] < 6
    assert trained(tmp_path) == clean


def test_a_second_ctrl_c_aborts_at_once(clean: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    pids = start_ranks(2, cli(lambda world, stop: small(tmp_path, world, should_stop=slowly(stop, mark, 30.0))))
    until(lambda: mark.exists() and mark.stat().st_size >= 2)
    began = time.monotonic()
    for _ in range(2):
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
    assert [wait(pid) for pid in pids] == [75, 75] and time.monotonic() - began < 10
    assert "aborted by Ctrl-C" in capfd.readouterr().err
    assert trained(tmp_path) == clean


@pytest.mark.parametrize("parallel", [None, SHARD], ids=["replicate", "shard"])
def test_scoring_stops_on_all_ranks(tmp_path: Path, parallel: ParallelSettings | None) -> None:
    """One rank hears of it; and what ranks score together is what one scores alone."""
    mark = tmp_path / "mark"

    def scored(world: World, should_stop: Callable[[], bool] | None = None) -> list[list[float]]:
        found = score(spread(world, parallel), PAIRS[:9], max_tokens=30, world=world, should_stop=should_stop)
        parts = world.gather([[r.sum_logp for r in responses] for responses in found])
        return [next(part for part in group if part) for group in zip(*parts, strict=True)]

    pids = start_ranks(2, cli(lambda world, stop: scored(world, slowly(stop, mark))))
    until(lambda: mark.exists() and mark.stat().st_size >= 2)
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [75, 75]

    def whole(world: World) -> None:
        (tmp_path / f"scores-{world.rank}").write_text(json.dumps(scored(world)))

    assert ranks(2, whole) == [0, 0]
    alone = [[r.sum_logp for r in responses] for responses in score(spread(None, None), PAIRS[:9])]
    for rank in (0, 1):
        for one, two in zip(alone, read_json(tmp_path / f"scores-{rank}"), strict=True):
            assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("team", [1, 2], ids=["each", "split"])
def test_generation_stops_on_all_ranks_and_goes_on_to_the_same_rows(tmp_path: Path, team: int) -> None:
    """Ranks with waves of their own, or in a team of which one hears of it."""
    mark = tmp_path / "mark"

    def answered(world: World, should_stop: Callable[[], bool] | None = None, at: str = "run") -> list[dict[str, Any]]:
        policy = PolicyModule(model_of("llama").requires_grad_(False))
        policy = split_policy(policy, world, team) if world.size > 1 else policy
        return wave_job.run(tmp_path / at, model=policy, world=world, should_stop=should_stop)

    pids = start_ranks(2, cli(lambda world, stop: answered(world, slowly(stop, mark))))
    until(lambda: mark.exists() and mark.stat().st_size >= 8)
    for pid in pids if team == 1 else pids[1:]:
        os.kill(pid, signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [75, 75]

    def whole(world: World) -> None:
        (tmp_path / f"rows-{world.rank}").write_text(json.dumps(answered(world)))

    assert ranks(2, whole) == [0, 0]
    first, second = (read_json(tmp_path / f"rows-{rank}") for rank in (0, 1))
    assert first == second
    for ours, theirs in zip(first, answered(World(), at="alone"), strict=True):
        for key in ("sum_logp", "end_logp"):
            assert ours.pop(key) == pytest.approx(theirs.pop(key), abs=0.0 if team == 1 else 1e-5)
        assert ours == theirs


# --- resumed (32, 35) ---


def test_resumed_at_any_step_is_uninterrupted(clean: bytes, tmp_path: Path) -> None:
    """In an epoch, at its end (3), right before the stage's end (5), after its last checkpoint, and when finished."""
    for step in (1, 3, 5):
        workdir = tmp_path / str(step)
        codes = ranks(2, lambda world, w=workdir, s=step: small(w, world, should_stop=stop_after(s)))  # type: ignore[misc]
        assert codes == [75, 75] and saved_steps(workdir)[-1] == step
        assert trained(workdir) == clean

    def ended(world: World) -> None:
        os.environ["MACPO_KILL_AT"] = "checkpoint-renamed:3" if world.rank == 0 else "checkpoint-renamed:9"
        small(tmp_path / "ended", world)

    assert ranks(2, ended) == [KILLED, 7] and saved_steps(tmp_path / "ended")[-1] == 6
    for _ in range(2):  # the second time it is finished, too

        def asked() -> bool:
            raise AssertionError("a step was made")

        assert trained(tmp_path / "ended", functools.partial(small, should_stop=asked)) == clean


def test_sharded_training_is_killed_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    job = functools.partial(small, parallel=SHARD)
    clean = trained(tmp_path / "clean", job)

    def body(world: World) -> None:
        if world.rank == 1:
            os.environ["MACPO_KILL_AT"] = "checkpoint-shards:2"
        job(tmp_path / "killed", world)

    assert ranks(2, body) == [7, KILLED]
    assert trained(tmp_path / "killed", job) == clean


def test_ranks_that_split_layers_stop_together_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Both have the same groups, and only the second hears of the stop."""
    job = functools.partial(small, parallel=ParallelSettings(tensor=2))
    clean = trained(tmp_path / "clean", job)

    def body(world: World) -> None:
        job(tmp_path / "run", world, should_stop=stop_after(3) if world.rank == 1 else None)

    assert ranks(2, body) == [75, 75] and saved_steps(tmp_path / "run") == [2, 3]
    assert trained(tmp_path / "run", job) == clean


def seen(folder: Path) -> list[list[int]]:
    """The groups of each step, in step order, on any rank."""
    lines = [json.loads(line) for path in sorted(folder.glob("seen-*")) for line in path.read_text().splitlines()]
    plan = BatchOrder(len(DOCUMENTS), SFT.batch, SFT.epochs, seed=3)
    totals = [sum(DOCUMENTS[i].num_response_tokens for i in indices) for _, indices in plan.steps()]
    assert len(set(totals)) == len(totals), "a step is known by its total"
    return [sorted(i for total, *groups in lines if total == wanted for i in groups) for wanted in totals]


def test_another_number_of_ranks_goes_on_in_the_same_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One rank, then two, then one again: every step sees the groups that it sees in a clean run; bits are not kept."""
    slow = SFT.model_copy(update=SLOW)

    def part(workdir: Path, world: World | None, stop: int) -> PolicyModule:
        name = f"seen-{world.size if world else 1}-{world.rank if world else 0}"
        return run_sft(
            workdir, slow, world=world, objective=Noted(workdir.parent / name), should_stop=stop_after(stop)
        )[0]

    whole, changing = tmp_path / "whole" / "run", tmp_path / "changing" / "run"
    for folder in (whole, changing):
        folder.mkdir(parents=True)
    alone = part(whole, None, 99)
    with pytest.raises(MacpoError):
        part(changing, None, 2)
    assert ranks(2, lambda world: part(changing, world, 2)) == [75, 75]
    said = capfd.readouterr().err
    assert "1 rank with 2 ranks: same sample order, results equal up to rounding, not bitwise" in said
    assert said.count("not bitwise") == 1
    ended = part(changing, None, 99)
    assert "2 ranks with 1 rank" in capfd.readouterr().err
    assert seen(changing.parent) == seen(whole.parent) == [sorted(i) for _, i in BatchOrder(11, 4, 2, seed=3).steps()]
    assert_same_training(rows(whole), rows(changing))
    for one, two in zip(weights(alone).values(), weights(ended).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
