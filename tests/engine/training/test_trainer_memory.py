"""Training on too little memory, and through losses that spike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks
from torch import Tensor
from training import DPO, PAIRS, SFT, SLOW, Starved, bits, rows, run_dpo, run_sft, stop_after, weights

from macpo.engine.data.batches import BatchOrder
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.failures import is_lost_peer, is_out_of_memory
from macpo.engine.distributed.world import World
from macpo.engine.errors import NumericsError, ResourceError, Stopped
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score

# --- memory ---


pytestmark = pytest.mark.usefixtures("no_idle_models")


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_out_of_memory_splits_the_micro_batch_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], late: bool
) -> None:
    """The step is repeated with half the budget, bit-exact with a run that had that budget from the start."""
    slow = SFT.model_copy(update=SLOW)
    starved = Starved(25, late=late)
    policy, _ = run_sft(tmp_path / "starved", slow, objective=starved)
    said = capfd.readouterr().err
    # the first step has 27 tokens: half of it from then on, and said once
    assert starved.failures == 1 and said == (
        "note: step 1: out of memory on rank 0: micro-batches have at most 13 tokens from here on (the settings allow "
        "1024)\n"
    )
    smaller, _ = run_sft(tmp_path / "smaller", slow.model_copy(update={"microbatch_tokens": 13}))
    assert bits(policy, tmp_path / "starved") == bits(smaller, tmp_path / "smaller")
    plain, _ = run_sft(tmp_path / "plain", slow)
    for name, tensor in weights(policy).items():
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=0, atol=1e-6)


def test_one_group_that_does_not_fit_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"step 2: one group of 19 tokens does not fit in memory: 6") as caught:
        run_sft(tmp_path, objective=Starved(16))
    assert caught.value.code == 4 and len(rows(tmp_path)) == 1
    assert all(way in str(caught.value) for way in ("checkpointing", "shorter responses", "sharding"))


def test_what_running_out_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value) and not is_lost_peer(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and not is_out_of_memory(RuntimeError("shapes differ"))


def test_scoring_splits_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyModule(model_of("llama"))
    whole = score(policy, PAIRS)
    token_logps = PolicyModule.token_logps

    def limited(self: PolicyModule, batch: PackedBatch) -> Tensor:
        if batch.num_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logps(self, batch)

    monkeypatch.setattr(PolicyModule, "token_logps", limited)
    limit = 40
    for one, two in zip(whole, score(policy, PAIRS), strict=True):
        assert [r.sum_logp for r in one] == pytest.approx([r.sum_logp for r in two], rel=1e-5)
    limit = 10
    with pytest.raises(ResourceError, match="does not fit in memory"):
        score(policy, PAIRS)


# --- spikes ---

MANY = some_groups(num_responses=2, count=26, seed=2)
SPIKY = DPO.model_copy(update={"batch": 1, "epochs": 1, "save_every_steps": 4} | SLOW)
SPIKE = BatchOrder(26, 1, 1, 3).order(0)[22]  # the 23rd step's pair, when the guard has seen enough


def run_spiky(workdir: Path, on_spike: str, *, stop_at: int = 99, world: World | None = None) -> PolicyModule:
    settings = SPIKY.model_copy(update={"on_spike": on_spike})
    return run_dpo(workdir, settings, groups=MANY, poison={SPIKE: 500.0}, should_stop=stop_after(stop_at), world=world)


def test_a_spike_is_a_warning_that_resuming_does_not_change(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    want = bits(run_spiky(tmp_path / "whole", "warn"), tmp_path / "whole")
    said = capfd.readouterr().err
    assert f"standard deviations above its recent mean; groups of the step: pair-{SPIKE}\n" in said
    assert said.count("warning: ") == said.count("warning: step 23: loss ") == 1
    log = rows(tmp_path / "whole")
    assert len(log) == 26 and [row["step"] for row in log if "spike" in row] == [23] and log[22]["spike"] > 6
    with pytest.raises(Stopped):
        run_spiky(tmp_path / "resumed", "warn", stop_at=22)
    assert bits(run_spiky(tmp_path / "resumed", "warn"), tmp_path / "resumed") == want
    run_dpo(tmp_path / "off", SPIKY.model_copy(update={"spike_sigma": None}), groups=MANY, poison={SPIKE: 500.0})
    assert [{k: v for k, v in row.items() if k != "spike"} for row in log] == rows(tmp_path / "off")


def test_a_spike_can_stop_the_stage_before_its_update(tmp_path: Path) -> None:
    for _ in range(2):  # again from the checkpoint: the same spike
        with pytest.raises(
            NumericsError, match=rf"step 23: loss .*: pair-{SPIKE}; last checkpoint: the one of step 22"
        ):
            run_spiky(tmp_path / "run", "stop")
        assert len(rows(tmp_path / "run")) == 22
    with pytest.raises(Stopped):
        run_spiky(tmp_path / "before", "stop", stop_at=22)
    folders = [tmp_path / name / "checkpoint" / "step-00000022" for name in ("run", "before")]
    for name in ("state.json", "shard-00001-of-00001.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    run_spiky(tmp_path / "run", "warn")  # what is done about a spike does not make the checkpoint another's
    assert len(rows(tmp_path / "run")) == 26


def test_two_ranks_see_the_same_spike(tmp_path: Path) -> None:
    assert ranks(2, lambda world: run_spiky(tmp_path, "stop", world=world)) == [6, 6]
    assert (tmp_path / "checkpoint" / "step-00000022").is_dir()
