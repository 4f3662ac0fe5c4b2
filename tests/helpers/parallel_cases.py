"""Small models, ways to train them, and what a few steps give: compared between ranks, meshes and ways to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import model_of, some_groups
from torch import Tensor
from torch.distributed.tensor import DTensor

from macpo.engine.config import LoraSettings, OptimSettings, ParallelSettings, PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models.parallelize import data_world, parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.training.objectives import preference
from macpo.engine.training.optim import Optimizer

PAIRS = some_groups(num_responses=2, count=8)
RATE = 1e-4  # at which Adam's answer to the rounding of a gradient near zero stays below 1e-6
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    architecture: str
    targets: Any = None
    """Modules that get a LoRA; None trains every weight."""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    dtype: torch.dtype = torch.float32
    """What it computes in."""
    micro: int = 1
    """Pairs of a micro-batch."""


SHARD, TENSOR = ParallelSettings(sharding="shard"), ParallelSettings(tensor=2)
HYBRID = ParallelSettings(sharding="hybrid")
EVERYTHING = ParallelSettings(sharding="shard", checkpointing="selective", offload_activations=True)
TIED = Case("llama", changes={"tie_word_embeddings": True})
LORA = Case("qwen3", "all-linear")
SOFTCAP = Case("gemma3_text", changes={"final_logit_softcapping": 5.0})
SINKS = Case("granite_swa", changes={"num_key_value_heads": 2, "sliding_window": 5})
BF16, BF16_ADAPTER = Case("llama", dtype=torch.bfloat16), Case("llama", "all-linear", dtype=torch.bfloat16)


def policy_of(case: Case) -> PolicyModule:
    base = model_of(case.architecture, **case.changes)
    if case.targets is None:
        return PolicyModule(base.requires_grad_(True), compute_dtype=case.dtype)
    wrapped = lora.new_adapter(base.to(case.dtype).requires_grad_(False), settings_of(case), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # 0 at first: A would get no gradient
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return PolicyModule(wrapped)


def settings_of(case: Case) -> LoraSettings:
    return LoraSettings(rank=4, target_modules=case.targets)


def run(
    case: Case, settings: ParallelSettings, world: World | None = None, policy: PolicyModule | None = None
) -> dict[str, Tensor]:
    """STEPS steps on all pairs: losses, norms, whole gradients of the first step, whole weights after the last one."""
    world = world or World()
    policy = parallelize(policy or policy_of(case), settings, world)
    data = data_world(policy, world)
    optimizer = Optimizer(policy.trainable_parameters(), OptimSettings(learning_rate=RATE, max_grad_norm=0.5))
    objective = preference(PreferenceSettings(), torch.full((len(PAIRS), 2), -30.0))
    mine = range(data.rank, len(PAIRS), data.size)
    starts = range(0, len(mine), case.micro)
    batches = [pack(PAIRS, max_tokens=1 << 20, indices=mine[i : i + case.micro])[0] for i in starts]
    out: dict[str, Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        stats = torch.zeros(1)
        for number, batch in enumerate(batches, start=1):
            policy.synchronise(last=number == len(batches))
            loss, _ = objective(policy, batch, len(PAIRS))
            loss.backward()
            stats += loss.detach()
        norm = optimizer.reduce(data, stats)
        if step == 0:
            for name, parameter in policy.trainable_parameters().items():
                assert parameter.grad is not None
                grad = parameter.grad
                out[f"grad.{name}"] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        losses.append(stats.item())
        norms.append(norm.item())
        optimizer.update(RATE, norms[-1])
    for name, tensor in policy.full_state().items():
        out[f"weight.{name}"] = tensor.clone()
    return out | {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, *, weights: bool = True) -> None:
    assert set(found) == set(wanted), what
    for name, tensor in wanted.items():
        if name.startswith("weight.") and not weights:
            continue
        atol = 2e-6 * max(1.0, tensor.abs().max().item()) if name.startswith("grad.") else 1e-6
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
