"""One model over two ranks: everything here only splits sums.

Two gloo ranks run all cases in one job (fork after import); what they write is compared with one process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import model_of
from forks import ranks
from parallel_cases import (
    BF16,
    BF16_ADAPTER,
    EVERYTHING,
    HYBRID,
    LORA,
    PAIRS,
    RATE,
    SHARD,
    SINKS,
    SOFTCAP,
    TENSOR,
    TIED,
    Case,
    assert_same,
    policy_of,
    run,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from macpo.engine.config import FullSettings, OptimSettings, ParallelSettings, PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World, finish
from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import policy
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import mesh, parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.optim import Optimizer
from macpo.engine.training.trainer import train

# (case, settings, ranks of a node): every kind of head and of layer with FSDP2 or split
TWO_RANKS: dict[str, tuple[Case, ParallelSettings, int]] = {
    "tied, sharded": (TIED, SHARD, 2),
    "tied, split": (TIED, TENSOR, 2),
    "untied, 1 x 2": (Case("llama"), HYBRID, 2),
    "untied, 2 x 1": (Case("llama"), HYBRID, 1),
    "softcap": (SOFTCAP, SHARD, 2),
    "sinks": (SINKS, TENSOR, 2),
    "biases": (Case("gpt_neox"), TENSOR, 2),
    "norms of heads": (Case("qwen3"), TENSOR, 2),
    "gathered outputs": (Case("phi3", "all-linear"), TENSOR, 2),
    "adapter, kept on the host": (LORA, EVERYTHING, 2),
    "adapter on the head, sharded": (Case("llama", ("lm_head", "o_proj")), SHARD, 2),
    "adapter on the head, split": (Case("llama", ("lm_head", "o_proj")), TENSOR, 2),
    "2 micro-batches of 2": (Case("llama", micro=2), SHARD, 2),
    "1 micro-batch of 4": (Case("llama", micro=4), SHARD, 2),
}


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """FSDP2, hybrid meshes and tensor parallelism against one process: gradients, then weights."""

    folder = tmp_path / "base"
    policy_of(BF16).base.to(torch.bfloat16).save_pretrained(folder)

    def body(world: World) -> None:
        def keep(name: str, result: dict[str, Tensor]) -> None:
            if world.is_main:
                save_file({key: value.contiguous() for key, value in result.items()}, tmp_path / name)

        for name, (case, settings, local) in TWO_RANKS.items():
            os.environ["LOCAL_WORLD_SIZE"] = str(local)
            keep(name, run(case, settings, world))
        keep("bf16", run(BF16, SHARD, world))
        keep("bf16 adapter", run(BF16_ADAPTER, SHARD, world))
        keep("bf16 read", run(BF16, SHARD, world, from_pool(folder, spread=True)))
        check_exchanges(world)
        check_memory(world)
        check_loading(world)
        keep("trained", trained(tmp_path / "two", SHARD, world))
        check_refusals(world)

    assert ranks(2, body, timeout_s=60.0) == [0, 0]

    alone: dict[Case, dict[str, Tensor]] = {}
    for name, (case, _, _) in TWO_RANKS.items():
        big = replace(case, micro=8)
        if big not in alone:
            alone[big] = run(big, ParallelSettings())
        # the gradient of gpt_neox's key bias is 0 but for rounding, and so is Adam's step
        assert_same(load_file(tmp_path / name), alone[big], name, weights=name != "biases")
    one = trained(tmp_path / "one", ParallelSettings(), World())
    assert_same(load_file(tmp_path / "trained"), one, "trained")
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for first, second in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        if first["step"] == 1:
            assert second["loss"] == pytest.approx(math.log(2), abs=1e-6)
            del first["accuracy"], second["accuracy"]  # of margins that are 0 but for rounding
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)
    try:  # one process is a mesh of one
        bf16 = {"bf16": run(BF16, ParallelSettings()), "bf16 adapter": run(BF16_ADAPTER, ParallelSettings())}
        bf16["bf16 read"] = run(BF16, ParallelSettings(), policy=from_pool(folder, spread=False))
    finally:
        finish()
    exact = run(Case("llama"), ParallelSettings())
    for name, single in bf16.items():
        found = load_file(tmp_path / name)
        torch.testing.assert_close(found["losses"], single["losses"], rtol=1e-5, atol=1e-5)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}, "masters and their gradients"
    assert 1e-6 < (bf16["bf16"]["losses"] - exact["losses"]).abs().max().item() < 1e-2, "computed in bfloat16"


def from_pool(folder: Path, *, spread: bool) -> PolicyModule:
    """Full tuning of a bfloat16 base; one that will be spread is read for it alone and not yet float32."""
    cache = ModelCache(dtype=torch.bfloat16)
    policy = cache.policy(PolicyRef(str(folder)), FullSettings(), spread=spread)
    assert len(cache.resident) == (0 if spread else 1)
    assert policy.base.dtype == (torch.bfloat16 if spread else torch.float32)
    return policy


def trained(workdir: Path, settings: ParallelSettings, world: World) -> dict[str, Tensor]:
    """DPO with a LoRA through score() and train(), 2 epochs of 5 + 3 pairs: ranks get unequal shares."""
    policy = parallelize(policy_of(LORA), settings, world)
    scores = score(policy, PAIRS, max_tokens=40, world=world)
    parts = world.gather([[r.sum_logp for r in pair] for pair in scores])
    rows = [next(pair for pair in pairs if pair) for pairs in zip(*parts, strict=True)]
    optim = PreferenceSettings(learning_rate=RATE, epochs=2, batch=5, microbatch_tokens=30, sft_weight=0.0)
    objective = preference(optim, torch.tensor(rows, dtype=torch.float32))
    workdir.mkdir(exist_ok=True)
    train(policy, PAIRS, objective, optim, seed=3, workdir=workdir, world=world)
    return policy.full_state()


def check_exchanges(world: World) -> None:
    """Gradients reach the shards once a step where memory allows, else with every micro-batch: the same sums."""
    (batch,) = pack(PAIRS[:2], max_tokens=1 << 20)
    sums = []
    for limit in (1 << 30, 0):
        policy.KEPT_GRADIENT_BYTES = limit
        sharded = parallelize(policy_of(TIED), SHARD, world)
        for last in (False, True):
            sharded.synchronise(last)
            sft()(sharded, batch, 1)[0].backward()
            early = [p.grad is not None for p in sharded.parameters()]
            assert all(early) if last or not limit else not any(early)
        sums.append([p.grad.full_tensor() for p in sharded.parameters()])  # type: ignore[union-attr]
    for kept, scattered in zip(*sums, strict=True):
        torch.testing.assert_close(kept, scattered, rtol=1e-6, atol=1e-5)


def check_memory(world: World) -> None:
    """A rank holds its half of weights and moments, at rest and after scoring; a row that is left over is padding."""
    for case in (Case("llama"), LORA):
        policy = policy_of(case)
        total = sum(p.numel() for p in policy.parameters())
        rows = sum(p.numel() // max(1, p.shape[0]) for p in policy.parameters())
        parallelize(policy, SHARD, world)
        for _ in range(2):
            parameters = list(policy.parameters())
            assert all(isinstance(p, DTensor) for p in parameters)
            local = sum(p.to_local().untyped_storage().nbytes() // 4 for p in parameters)  # type: ignore[attr-defined]
            assert total / 2 <= local <= total / 2 + rows, (local, total)
            score(policy, PAIRS, max_tokens=40)
        trainable = policy.trainable_parameters()
        moments = Optimizer(trainable, OptimSettings(learning_rate=RATE)).tensors()
        held = sum(t.to_local().numel() for name, t in moments.items() if "exp_avg." in name)  # type: ignore[attr-defined]
        assert held <= sum(p.numel() for p in trainable.values()) / 2 + rows


def check_loading(world: World) -> None:
    """Whole tensors and sharded ones come back as this rank's shards, moments too."""
    for settings in (SHARD, TENSOR):
        policy = parallelize(policy_of(TIED), settings, world)
        optimizer = Optimizer(policy.trainable_parameters(), OptimSettings(learning_rate=RATE))
        own = optimizer.tensors()
        generator = torch.Generator().manual_seed(5)
        whole = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in own.items()}
        optimizer.load(whole)
        back = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in optimizer.tensors().items()}
        assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())
        optimizer.load(optimizer.tensors())
        state = policy.full_state()
        if world.is_main:
            assert all(torch.equal(state[name], whole[f"weight.{name}"]) for name in state)
        else:
            assert state == {}


def check_refusals(world: World) -> None:
    odd = {"num_key_value_heads": 1}
    with pytest.raises(ConfigError, match="num_key_value_heads is 1, which 2 ranks do not divide"):
        parallelize(PolicyModule(model_of("llama", **odd)), TENSOR, world)
    with pytest.raises(ConfigError, match="width 47"):
        parallelize(PolicyModule(model_of("llama", intermediate_size=47)), TENSOR, world)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no plan for tensor parallelism"):
        parallelize(PolicyModule(model_of("gpt2", n_head=4, n_embd=32, n_layer=1)), TENSOR, world)


def test_ranks_that_do_not_fit() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="3 ranks cannot be split into groups of 2"):
        mesh(ParallelSettings(tensor=2), World(0, 3), cpu)
    with pytest.raises(ConfigError, match="nodes of 4"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "4")
        mesh(ParallelSettings(sharding="hybrid"), World(0, 6), cpu)
    assert mesh(ParallelSettings(sharding="shard"), World(), cpu) is None
