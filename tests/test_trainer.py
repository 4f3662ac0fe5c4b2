"""The training loop: what a step is, accumulation, ranks, resuming to the bit, kills, numbers that are not finite."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import model_of, some_groups
from forks import die, forked, ranks
from torch import Tensor

from macpo.engine.config import OptimSettings, PreferenceSettings
from macpo.engine.errors import ConfigError, DataError, NumericsError, Stopped
from macpo.engine.model import PolicyModule
from macpo.engine.objectives import preference, reference_logps, sft
from macpo.engine.optim import learning_rate
from macpo.engine.pack import PrefixGroup
from macpo.engine.parallel import World
from macpo.engine.plan import Plan, share
from macpo.engine.scoring import score
from macpo.engine.trainer import TrainResult, train

SFT = OptimSettings(learning_rate=3e-3, epochs=2, batch=4, warmup_fraction=0.2, weight_decay=0.1, save_every_steps=2)
DPO = PreferenceSettings(learning_rate=3e-3, epochs=2, batch=4, save_every_steps=2)
# Adam divides by the gradient's size, so where a gradient is near zero its rounding moves the weight by a share of the
# learning rate. Runs that sum in another order are compared at a rate at which that share stays below 1e-6.
SLOW = {"learning_rate": 1e-4}
DOCUMENTS = some_groups(num_responses=1, count=11)  # 3 steps an epoch, the last of 3 groups
PAIRS = some_groups(num_responses=2, count=11)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # bits are promised for a fixed number of threads; forks need a quiet parent


def run_sft(
    workdir: Path,
    settings: OptimSettings = SFT,
    *,
    world: World | None = None,
    groups: list[PrefixGroup] | None = None,
    seed: int = 3,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[PolicyModule, TrainResult]:
    policy = PolicyModule(model_of("llama"))
    documents = DOCUMENTS if groups is None else groups
    result = train(policy, documents, sft(), settings, seed=seed, workdir=workdir, world=world, should_stop=should_stop)
    return policy, result


def run_dpo(workdir: Path, settings: PreferenceSettings = DPO, *, world: World | None = None) -> PolicyModule:
    policy = PolicyModule(model_of("llama"))
    ref = reference_logps(score(policy, PAIRS))
    train(policy, PAIRS, preference(settings, ref), settings, seed=3, workdir=workdir, world=world)
    return policy


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(policy: PolicyModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def bits(policy: PolicyModule, workdir: Path) -> str:
    """SHA-256 of every weight and of metrics.jsonl."""
    digest = hashlib.sha256((workdir / "metrics.jsonl").read_bytes())
    for name, tensor in weights(policy).items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def stop_after(count: int) -> Callable[[], bool]:
    """True on the count-th question, which is asked once a step."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= count


# --- what a step is ---


def test_steps_are_consecutive_groups_of_a_seeded_order() -> None:
    plan = Plan(num_groups=11, batch=4, epochs=3, seed=5)
    steps = list(plan.steps())
    assert [step for step, _ in steps] == list(range(9)) and plan.num_steps == 9
    assert [len(indices) for _, indices in steps] == [4, 4, 3] * 3
    for epoch in range(3):
        assert sorted(i for _, indices in steps[3 * epoch : 3 * epoch + 3] for i in indices) == list(range(11))
    assert plan.order(0) != plan.order(1) != Plan(11, 4, 3, seed=6).order(1)
    assert plan.order(1) == Plan(11, 99, 2, seed=5).order(1), "the order depends on seed and epoch alone"
    for start in range(10):
        assert list(plan.steps(start)) == steps[start:]


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


def assert_same_training(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-6, abs=1e-6)
        assert x == pytest.approx(y, rel=1e-5, abs=1e-5)  # summed log-probs, of size 100


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """SFT and DPO, two gloo processes with half of every step each; every rank ends with the same weights."""
    outputs = tmp_path / "out"
    outputs.mkdir()
    slow_sft, slow_dpo = SFT.model_copy(update=SLOW), DPO.model_copy(update=SLOW)

    def body(world: World) -> None:
        policy, _ = run_sft(tmp_path / "sft2", slow_sft, world=world)
        save(policy, outputs / f"sft{world.rank}")
        save(run_dpo(tmp_path / "dpo2", slow_dpo, world=world), outputs / f"dpo{world.rank}")

    assert ranks(2, body) == [0, 0]
    singles = {"sft": run_sft(tmp_path / "sft1", slow_sft)[0], "dpo": run_dpo(tmp_path / "dpo1", slow_dpo)}
    for kind, single in singles.items():
        assert (outputs / f"{kind}0").read_bytes() == (outputs / f"{kind}1").read_bytes()
        assert_same_training(rows(tmp_path / f"{kind}1"), rows(tmp_path / f"{kind}2"))
        both = torch.frombuffer(bytearray((outputs / f"{kind}0").read_bytes()), dtype=torch.float32)
        torch.testing.assert_close(torch.cat([p.flatten() for p in weights(single).values()]), both, rtol=0, atol=1e-6)


def save(policy: PolicyModule, path: Path) -> None:
    path.write_bytes(torch.cat([p.flatten() for p in weights(policy).values()]).numpy().tobytes())


# --- stopping, killing, going on ---


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    want = bits(run_sft(tmp_path / "whole")[0], tmp_path / "whole")
    for step in range(1, 6):
        workdir = tmp_path / str(step)
        with pytest.raises(Stopped, match=f"after step {step} of 6") as caught:
            run_sft(workdir, should_stop=stop_after(step))
        assert caught.value.code == 75
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
    order = Plan(len(PAIRS), DPO.batch, DPO.epochs, 3).order(0)
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
