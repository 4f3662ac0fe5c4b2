"""Training stages of seconds that the trainer's and the fault tests run, stop, kill and compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from architectures import model_of, some_groups
from torch import Tensor
from torch.distributed.tensor import DTensor

from macpo.engine.config import OptimSettings, ParallelSettings, PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.world import World
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score
from macpo.engine.training.objectives import Objective, preference, sft
from macpo.engine.training.reference import reference_logps
from macpo.engine.training.trainer import TrainResult, train

SFT = OptimSettings(learning_rate=3e-3, epochs=2, batch=4, warmup_fraction=0.2, weight_decay=0.1, save_every_steps=2)
DPO = PreferenceSettings(learning_rate=3e-3, epochs=2, batch=4, save_every_steps=2)
# Adam divides by the gradient's size, so where a gradient is near zero its rounding moves the weight by a share of the
# learning rate. Runs that sum in another order are compared at a rate at which that share stays below 1e-6.
SLOW = {"learning_rate": 3e-5}
DOCUMENTS = some_groups(num_responses=1, count=11)  # 3 steps an epoch, the last of 3 groups
PAIRS = some_groups(num_responses=2, count=11)


def run_sft(
    workdir: Path,
    settings: OptimSettings = SFT,
    *,
    world: World | None = None,
    groups: list[PrefixGroup] | None = None,
    seed: int = 3,
    should_stop: Callable[[], bool] | None = None,
    objective: Objective | None = None,
    parallel: ParallelSettings | None = None,
) -> tuple[PolicyModule, TrainResult]:
    policy = spread(world, parallel)
    documents = DOCUMENTS if groups is None else groups
    result = train(
        policy,
        documents,
        objective or sft(),
        settings,
        seed=seed,
        workdir=workdir,
        world=world,
        should_stop=should_stop,
    )
    return policy, result


def run_dpo(
    workdir: Path,
    settings: PreferenceSettings = DPO,
    *,
    world: World | None = None,
    groups: list[PrefixGroup] | None = None,
    parallel: ParallelSettings | None = None,
    poison: Mapping[int, float] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PolicyModule:
    """`poison`: pair -> what its chosen response's reference log-prob is instead."""
    pairs = PAIRS if groups is None else groups
    ref = reference_logps(score(PolicyModule(model_of("llama")), pairs))
    for index, value in (poison or {}).items():
        ref[index, 0] = value
    policy = spread(world, parallel)
    ids = [f"pair-{i}" for i in range(len(pairs))]
    train(
        policy,
        pairs,
        preference(settings, ref),
        settings,
        seed=3,
        workdir=workdir,
        ids=ids,
        world=world,
        should_stop=should_stop,
    )
    return policy


def spread(world: World | None, parallel: ParallelSettings | None) -> PolicyModule:
    policy = PolicyModule(model_of("llama"))
    return policy if parallel is None else parallelize(policy, parallel, world or World.current())


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(policy: PolicyModule) -> dict[str, Tensor]:
    """Whole weights; with a sharded policy, all ranks call this."""
    found = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


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


def assert_same_training(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-6, abs=1e-6)
        # in the first step the policy is its own reference: which reward is larger, rounding decides
        first, second = ({k: v for k, v in row.items() if k != "accuracy" or row["step"] > 1} for row in (x, y))
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)  # summed log-probs, of size 100


class Starved(Objective):
    """SFT on a device that holds so many tokens; `late`: the backward notices, after it has added up some gradients."""

    metrics: tuple[str, ...] = ()
    fingerprint = "sft"

    def __init__(self, tokens: int, *, late: bool = False) -> None:
        self.inner, self.tokens, self.late = sft(), tokens, late
        self.failures = 0

    def check(self, groups: Sequence[PrefixGroup]) -> None: ...

    def size(self, group: PrefixGroup) -> int:
        return self.inner.size(group)

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        if batch.num_tokens <= self.tokens:
            return self.inner(policy, batch, total)
        self.failures += 1
        if not self.late:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss, sums = self.inner(policy, batch, total)
        first, last = (policy.base.model.layers[i].self_attn.q_proj.weight for i in (0, -1))

        def fail(_: Tensor) -> None:
            hook.remove()
            assert last.grad is not None, "the backward is half done"
            raise torch.OutOfMemoryError("CUDA out of memory")

        hook = first.register_post_accumulate_grad_hook(fail)
        return loss, sums
