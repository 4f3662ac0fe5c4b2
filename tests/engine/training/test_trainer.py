"""The training loop: what a step is, accumulation, ranks, bit-exact resuming, kills, numbers that are not finite."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import model_of, separate_logps, some_groups
from forks import die, forked, ranks
from torch import Tensor
from training import (
    DOCUMENTS,
    DPO,
    PAIRS,
    SFT,
    SLOW,
    assert_same_training,
    bits,
    rows,
    run_dpo,
    run_sft,
    stop_after,
    weights,
)

from macpo.engine.config import OptimSettings, ParallelSettings
from macpo.engine.data.batches import BatchOrder, microbatches, share
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, NumericsError, Stopped
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score
from macpo.engine.training.leftovers import goes_on_from
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.optim import learning_rate
from macpo.engine.training.reference import reference_logps
from macpo.engine.training.trainer import train

# --- what a step is ---


def test_steps_are_consecutive_groups_of_a_seeded_order() -> None:
    plan = BatchOrder(num_groups=11, batch=4, epochs=3, seed=5)
    steps = list(plan.steps())
    assert [step for step, _ in steps] == list(range(9)) and plan.num_steps == 9
    assert [len(indices) for _, indices in steps] == [4, 4, 3] * 3
    for epoch in range(3):
        assert sorted(i for _, indices in steps[3 * epoch : 3 * epoch + 3] for i in indices) == list(range(11))
    assert plan.order(0) != plan.order(1) != BatchOrder(11, 4, 3, seed=6).order(1)
    assert plan.order(1) == BatchOrder(11, 99, 2, seed=5).order(1), "the order depends on seed and epoch alone"
    for start in range(10):
        assert list(plan.steps(start)) == steps[start:]


@pytest.mark.parametrize("max_tokens", [1, 20, 30, 45, 1000])
def test_ranks_of_a_collective_policy_have_equally_many_micro_batches(max_tokens: int) -> None:
    """Every group once, and fillers only where a rank has fewer; each rank finds the number by itself."""
    fillers = 0
    for size in (1, 2, 3, 8):
        for _, indices in BatchOrder(len(PAIRS), 4, 2, seed=5).steps():
            parts = [
                microbatches(PAIRS, indices, max_tokens, World(rank, size), collective=True) for rank in range(size)
            ]
            assert len({len(part) for part in parts}) == 1
            real = [micro for part in parts for micro in part if not micro.filler]
            assert Counter(i for micro in real for i in micro.batch.groups) == Counter(indices)
            assert all(micro.batch.num_tokens <= max_tokens or len(micro.batch.groups) == 1 for micro in real)
            fillers += sum(micro.filler for part in parts for micro in part)
            alone = [microbatches(PAIRS, indices, max_tokens, World(r, size), collective=False) for r in range(size)]
            assert [len(part) for part in alone] == [sum(not m.filler for m in part) for part in parts]
    assert fillers > 0


def test_ranks_share_a_step_without_loss_and_evenly() -> None:
    indices = [7, 2, 9, 0, 5, 4]
    shares = [share(PAIRS, indices, World(rank, 3)) for rank in range(3)]
    assert Counter(i for part in shares for i in part) == Counter(indices)
    loads = [sum(PAIRS[i].num_tokens for i in part) for part in shares]
    assert max(loads) - min(loads) <= max(PAIRS[i].num_tokens for i in indices)


def test_learning_rate_by_hand() -> None:
    def rates(schedule: str) -> list[float]:
        settings = OptimSettings.model_validate({"learning_rate": 2.0, "schedule": schedule, "warmup_fraction": 0.2})
        return [learning_rate(settings, step, 10) for step in range(10)]

    cosine = [1 + math.cos(math.pi * k / 8) for k in range(8)]
    assert rates("cosine") == pytest.approx([1.0, 2.0, *cosine])
    assert rates("linear") == pytest.approx([1.0, 2.0, *(2 * (1 - k / 8) for k in range(8))])
    assert rates("constant") == pytest.approx([1.0] + [2.0] * 9)


def test_the_log_has_a_row_a_step_with_what_was_promised(tmp_path: Path) -> None:
    run_dpo(tmp_path, DPO.model_copy(update={"sft_weight": 0.0}))
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert sum(row["tokens"] for row in log) == 2 * sum(group.num_tokens for group in PAIRS)
    last = log[-1]
    assert last["loss"] < log[0]["loss"] and last["accuracy"] > 0.9
    assert last["chosen_rewards"] - last["rejected_rewards"] == pytest.approx(last["margin"], rel=1e-4)
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [1, 2, 3, 4, 5, 6] and all(row["tokens_per_s"] > 0 for row in timing)


def test_sft_learns_and_full_training_leaves_no_weight_out(tmp_path: Path) -> None:
    before = weights(PolicyModule(model_of("llama")))
    policy, result = run_sft(tmp_path, SFT.model_copy(update={"epochs": 8}))
    assert result.steps == 24 and result.last["loss"] < 0.6 * rows(tmp_path)[0]["loss"]
    assert [name for name, p in weights(policy).items() if torch.equal(p, before[name])] == []


# --- what must not matter ---


@pytest.mark.parametrize(
    "run",
    [
        lambda workdir, changes: run_sft(workdir, SFT.model_copy(update=changes))[0],
        lambda workdir, changes: run_dpo(workdir, DPO.model_copy(update=changes)),
    ],
    ids=["sft", "dpo"],
)
def test_accumulation_equals_the_big_batch(
    tmp_path: Path, run: Callable[[Path, dict[str, float]], PolicyModule]
) -> None:
    one = run(tmp_path / "one", SLOW)
    many = run(tmp_path / "many", SLOW | {"microbatch_tokens": 20})
    assert_same_training(rows(tmp_path / "one"), rows(tmp_path / "many"))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(many)[name], rtol=0, atol=1e-6)


def test_eight_at_once_or_four_or_two_are_one_batch(tmp_path: Path) -> None:
    """4 x 2 = 2 x 4 = 8: the pairs are of one length, so the token budget says how many a micro-batch has."""
    pairs = [PrefixGroup(g.prompt_ids[:1] * 4, [g.responses[0][:1] * 5, g.responses[1][:1] * 3]) for g in PAIRS * 2]
    pairs = pairs[:16]
    settings = DPO.model_copy(update=SLOW | {"batch": 8, "epochs": 3})
    runs = {}
    for count in (8, 4, 2):
        steps = [indices for _, indices in BatchOrder(16, 8, 3, seed=3).steps()]
        made = [len(microbatches(pairs, step, 12 * count, World(), collective=False)) for step in steps]
        assert made == [8 // count] * 6
        workdir = tmp_path / str(count)
        policy = run_dpo(workdir, settings.model_copy(update={"microbatch_tokens": 12 * count}), groups=pairs)
        runs[count] = (rows(workdir), torch.cat([p.flatten() for p in weights(policy).values()]))
    for count in (4, 2):
        assert_same_training(runs[8][0], runs[count][0])
        torch.testing.assert_close(runs[8][1], runs[count][1], rtol=0, atol=1e-6)


def test_packed_training_is_padded_training(tmp_path: Path) -> None:
    """The same six steps by hand: one padded Hugging Face forward with its mask, the DPO formula, torch's AdamW."""
    settings = DPO.model_copy(update=SLOW | {"sft_weight": 0.0, "schedule": "constant"})
    packed = run_dpo(tmp_path, settings)
    model = model_of("llama").requires_grad_(True)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-5, betas=settings.adam_betas, weight_decay=0.0)

    def sums(indices: list[int]) -> Tensor:
        logps = separate_logps(model, [PAIRS[i] for i in indices])
        return torch.stack([token_logps.sum() for token_logps in logps]).reshape(-1, 2)

    with torch.no_grad():
        ref = torch.cat([sums([i]) for i in range(len(PAIRS))])
    losses = []
    for _, indices in BatchOrder(len(PAIRS), 4, 2, seed=3).steps():
        margin = (sums(indices) - ref[indices]) @ torch.tensor([1.0, -1.0])
        loss = -torch.nn.functional.logsigmoid(settings.beta * margin).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses, abs=1e-5)
    padded = dict(model.named_parameters())
    for name, tensor in weights(packed).items():
        torch.testing.assert_close(tensor, padded[name].detach(), rtol=0, atol=2e-6)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """SFT and DPO, two gloo processes with half of every step each; every rank ends with the same weights.

    Replicated and sharded; sharded with micro-batches so small that a rank needs fillers to keep in step.
    """
    outputs = tmp_path / "out"
    outputs.mkdir()
    slow_sft, slow_dpo = SFT.model_copy(update=SLOW), DPO.model_copy(update=SLOW)
    small = {"microbatch_tokens": 20}

    def body(world: World) -> None:
        for name, parallel, changes in (("2", None, {}), ("-shard", ParallelSettings(sharding="shard"), small)):
            policy, _ = run_sft(
                tmp_path / f"sft{name}", slow_sft.model_copy(update=changes), world=world, parallel=parallel
            )
            save(policy, outputs / f"sft{name}-{world.rank}")
            settings = slow_dpo.model_copy(update=changes)
            policy = run_dpo(tmp_path / f"dpo{name}", settings, world=world, parallel=parallel)
            save(policy, outputs / f"dpo{name}-{world.rank}")

    assert ranks(2, body) == [0, 0]
    for groups in (DOCUMENTS, PAIRS):
        steps = [indices for _, indices in BatchOrder(11, 4, 2, seed=3).steps()]
        parts = [microbatches(groups, step, 20, World(r, 2), collective=True) for step in steps for r in (0, 1)]
        assert any(micro.filler for part in parts for micro in part)
    singles = {"sft": run_sft(tmp_path / "sft1", slow_sft)[0], "dpo": run_dpo(tmp_path / "dpo1", slow_dpo)}
    for kind, single in singles.items():
        whole = torch.cat([p.flatten() for p in weights(single).values()])
        for name in (f"{kind}2", f"{kind}-shard"):
            assert (outputs / f"{name}-0").read_bytes() == (outputs / f"{name}-1").read_bytes()
            assert_same_training(rows(tmp_path / f"{kind}1"), rows(tmp_path / name))
            both = torch.frombuffer(bytearray((outputs / f"{name}-0").read_bytes()), dtype=torch.float32)
            torch.testing.assert_close(whole, both, rtol=0, atol=1e-6)


def save(policy: PolicyModule, path: Path) -> None:
    path.write_bytes(torch.cat([p.flatten() for p in weights(policy).values()]).numpy().tobytes())


# --- stopping, killing, resuming ---


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    want = bits(run_sft(tmp_path / "whole")[0], tmp_path / "whole")
    assert goes_on_from(tmp_path) == ""
    for step in range(1, 6):
        workdir = tmp_path / str(step)
        with pytest.raises(Stopped, match=f"after step {step} of 6") as caught:
            run_sft(workdir, should_stop=stop_after(step))
        assert caught.value.code == 75 and goes_on_from(workdir) == f"step {step} of 6"
        assert len(rows(workdir)) == step
        assert bits(run_sft(workdir)[0], workdir) == want


def test_a_wish_to_stop_that_comes_with_the_last_step_changes_nothing(tmp_path: Path) -> None:
    _, result = run_sft(tmp_path, should_stop=stop_after(6))
    assert result.steps == 6


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at every step and at every moment of writing a checkpoint."""
    want = bits(run_sft(tmp_path / "whole")[0], tmp_path / "whole")

    def dying(step: int) -> Callable[[], bool]:
        stop = stop_after(step)
        return lambda: die() if stop() else False  # type: ignore[func-returns-value, return-value]

    for step in range(1, 7):
        workdir = tmp_path / f"step{step}"
        assert forked(lambda w=workdir, s=step: run_sft(w, should_stop=dying(s))) == -9
        assert bits(run_sft(workdir)[0], workdir) == want
    points = ["file-written", "file-renamed", "checkpoint-shards", "checkpoint-manifest", "checkpoint-renamed"]
    for point in points:
        for count in (1, 3):
            workdir = tmp_path / f"{point}{count}"
            monkeypatch.setenv("MACPO_KILL_AT", f"{point}:{count}")
            assert forked(lambda w=workdir: run_sft(w)) == -9
            monkeypatch.delenv("MACPO_KILL_AT")
            assert bits(run_sft(workdir)[0], workdir) == want
            assert not list(workdir.rglob("*.tmp"))


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first, result = run_sft(tmp_path)
    want = bits(first, tmp_path)
    again, second = run_sft(tmp_path, should_stop=lambda: pytest.fail("a step was made"))
    assert bits(again, tmp_path) == want and second == result
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_torn_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    want = bits(run_sft(tmp_path / "whole")[0], tmp_path / "whole")
    with pytest.raises(Stopped):
        run_sft(tmp_path, should_stop=stop_after(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    assert bits(run_sft(tmp_path)[0], tmp_path) == want


@pytest.mark.parametrize(
    "change",
    [
        {"settings": SFT.model_copy(update={"learning_rate": 1e-3})},
        {"groups": some_groups(num_responses=1, count=11, seed=1)},
        {"seed": 4},
    ],
    ids=["settings", "data", "seed"],
)
def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(Stopped):
        run_sft(tmp_path, should_stop=stop_after(2))
    with pytest.raises(ConfigError, match="other data, settings, seed or weights"):
        run_sft(tmp_path, **change)  # type: ignore[arg-type]


def test_two_ranks_stop_together_and_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wish reaches rank 1 only; both stop at the same step. Another world size is told to be not bitwise."""
    slow = SFT.model_copy(update=SLOW)

    def body(world: World) -> None:
        run_sft(tmp_path, slow, world=world, should_stop=stop_after(2) if world.rank == 1 else None)

    assert ranks(2, body) == [75, 75]
    assert len(rows(tmp_path)) == 2
    policy, _ = run_sft(tmp_path, slow)
    assert "not bitwise" in capsys.readouterr().err
    whole, _ = run_sft(tmp_path / "whole", slow)
    for name, tensor in weights(policy).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=1e-6)


# --- numbers and data that cannot be used ---


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    policy = PolicyModule(model_of("llama"))
    ref = reference_logps(score(policy, PAIRS))
    order = BatchOrder(len(PAIRS), DPO.batch, DPO.epochs, 3).order(0)
    poisoned = order[9]  # in the third step, after the checkpoint of the second
    ref[poisoned] = math.nan
    ids = [f"pair-{k}" for k in range(len(PAIRS))]
    seen: list[dict[str, Tensor]] = []

    def look() -> bool:
        seen.append(weights(policy))
        return False

    with pytest.raises(NumericsError) as caught:
        train(policy, PAIRS, preference(DPO, ref), DPO, seed=3, workdir=tmp_path, ids=ids, should_stop=look)
    assert caught.value.code == 6
    text = str(caught.value)
    assert "step 3:" in text and f"pair-{poisoned};" in text and "the one of step 2" in text
    assert len(seen) == 3 and len(rows(tmp_path)) == 2
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, seen[-1][name])


def test_weights_that_are_not_finite_name_the_step(tmp_path: Path) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 0] = math.inf
    with pytest.raises(NumericsError, match=r"step 1: loss (nan|inf|-inf).*none was saved"):
        train(PolicyModule(model), DOCUMENTS, sft(), SFT, seed=1, workdir=tmp_path)


def test_two_ranks_stop_at_the_same_step_when_one_finds_a_nan(tmp_path: Path) -> None:
    def body(world: World) -> None:
        policy = PolicyModule(model_of("llama"))
        ref = reference_logps(score(policy, PAIRS))
        ref[0] = math.nan  # one pair, so one rank
        train(policy, PAIRS, preference(DPO, ref), DPO, seed=3, workdir=tmp_path, world=world)

    assert ranks(2, body) == [6, 6]


def test_groups_that_do_not_fit_the_objective_are_refused(tmp_path: Path) -> None:
    policy = PolicyModule(model_of("llama"))
    for groups, ref, message in (
        (DOCUMENTS, torch.zeros(11, 2), "has 1 responses"),
        (PAIRS, torch.zeros(10, 2), "11 pairs but reference log-probs for 10"),
    ):
        with pytest.raises(DataError, match=message):
            train(policy, groups, preference(DPO, ref), DPO, seed=3, workdir=tmp_path)
    with pytest.raises(DataError, match="nothing to train on"):
        train(policy, [], sft(), SFT, seed=3, workdir=tmp_path)
    policy.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        train(policy, DOCUMENTS, sft(), SFT, seed=3, workdir=tmp_path)
