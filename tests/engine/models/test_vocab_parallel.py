"""The head under tensor parallelism: a rank keeps its rows of it, and the loss is that of the whole vocabulary.

Two gloo ranks run all cases in one job; `test_parallel.py` compares preference training of more models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ranks
from kernel_checks import assert_close
from parallel_cases import BF16, PAIRS, SOFTCAP, TENSOR, Case, assert_same, policy_of, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macpo.engine.config import PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models.head import linear_head
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.vocab_parallel import vocab_shard
from macpo.engine.scoring import score
from macpo.engine.training.objectives import Objective, preference, sft
from macpo.engine.training.reference import reference_logps

REFS = torch.linspace(-40, -20, 2 * len(PAIRS)).reshape(-1, 2)
SIMPO = PreferenceSettings(loss="simpo", beta=2.0, gamma=0.5, sft_weight=0.3)
OBJECTIVES = {"sft": sft(), "preference": preference(PreferenceSettings(sft_weight=0.5), REFS)}
OBJECTIVES["simpo"] = preference(SIMPO, None)
# 61 tokens are 31 and 30; 62 are cut evenly
CASES = {
    "tied": Case("llama", changes={"tie_word_embeddings": True}),
    "even": Case("llama", changes={"vocab_size": 62}),
    "softcap": SOFTCAP,
    "scale": Case("cohere", changes={"logit_scale": 0.3}),
    "frozen head": Case("llama", ("q_proj", "down_proj")),
    "adapter on the head": Case("llama", ("lm_head", "o_proj"), changes={"tie_word_embeddings": False}),
}


def gradients(policy: PolicyModule, objective: Objective) -> dict[str, Tensor]:
    """Loss and whole gradients of one micro-batch of all pairs, and of the same again added to them."""
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    out: dict[str, Tensor] = {}
    for time in ("", " again"):
        policy.synchronise(last=True)
        loss, _ = objective(policy, batch, len(PAIRS))
        loss.backward()
        out["loss" + time] = loss.detach()
        for name, parameter in policy.trainable_parameters().items():
            grad = parameter.grad
            assert grad is not None
            out[f"grad.{name}{time}"] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
            parameter.grad = None
    return out


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    def body(world: World) -> None:
        for name, case in CASES.items():
            policy = parallelize(policy_of(case), TENSOR, world)
            check_own_rows(policy, world)
            for kind, objective in OBJECTIVES.items():
                found = gradients(policy, objective)
                for key in [key for key in found if key.endswith(" again")]:
                    assert torch.equal(found.pop(key), found[key.removesuffix(" again")]), "backward twice"
                if world.is_main:
                    save_file({key: x.contiguous() for key, x in found.items()}, tmp_path / f"{name} {kind}")
            check_reference(policy, world)
        check_bf16(world)
        check_size(world)
        check_rule(world)

    assert ranks(2, body, timeout_s=60.0) == [0, 0]
    for name, case in CASES.items():
        alone = policy_of(case)
        for kind, objective in OBJECTIVES.items():
            wanted = {key: x for key, x in gradients(alone, objective).items() if not key.endswith(" again")}
            assert_same(load_file(tmp_path / f"{name} {kind}"), wanted, f"{name} {kind}")


def check_own_rows(policy: PolicyModule, world: World) -> None:
    """In a forward the head is this rank's rows."""
    (batch,) = pack(PAIRS[:1], max_tokens=1 << 20)
    vocab = policy.base.config.vocab_size
    head = policy(batch, lambda rows, head, batch: head)
    policy.release()
    assert head.shard is not None
    assert (head.shard.vocab, head.shard.rank, head.shard.size) == (vocab, world.rank, 2)
    assert head.weight.shape == (head.shard.count, policy.base.config.hidden_size)
    assert head.shard.count == (vocab + 1) // 2 - world.rank * (vocab % 2)
    assert not isinstance(head.weight, DTensor)


def check_reference(policy: PolicyModule, world: World) -> None:
    """Scores are the policy's own log-probs as training sees them: the first loss is ln 2."""
    refs = reference_logps(score(policy, PAIRS, world=world))
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    loss, _ = preference(PreferenceSettings(sft_weight=0.0), refs)(policy, batch, len(PAIRS))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def check_bf16(world: World) -> None:
    """The same hidden states through the cut and the gathered head: equal losses, gradients to their rounding."""
    cut = run(BF16, TENSOR, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("macpo.engine.models.head.vocab_shard", lambda weight: None)
        gathered = run(BF16, TENSOR, world)
    assert cut["losses"][0].item() == pytest.approx(gathered["losses"][0].item(), abs=1e-6)
    head = "grad.lm_head.weight"
    assert_close(cut[head], gathered[head], torch.bfloat16, head)
    for name in (name for name in cut if name.startswith("grad.")):
        assert (cut[name] - gathered[name]).norm() <= 0.02 * gathered[name].norm(), name


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns on this rank; of a DTensor, of what it is made of.

    The embedding's own gradient is apart: torch makes it whole on every rank before it is cut.
    """

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as operators on local tensors
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            if real and func is not torch.ops.aten.embedding_dense_backward.default:
                self.num_bytes = max(self.num_bytes, value.numel() * value.element_size())
        return result


def largest(policy: PolicyModule) -> int:
    """Compares scoring and a step of each kind."""
    (batch,) = pack(PAIRS[:1], max_tokens=1 << 20)
    with Largest() as seen:
        score(policy, PAIRS[:1], max_tokens=40)
        for objective in (sft(), preference(PreferenceSettings(), REFS)):
            policy.synchronise(last=True)
            objective(policy, batch, 1)[0].backward()
    return seen.num_bytes


def check_size(world: World) -> None:
    """Forward and backward never hold the whole head, its gradient or the logits of all tokens.

    Tied, because FSDP2 gathers an embedding's shard and a head's in one buffer, with the last norm's weight.
    """
    for targets in (None, ("q_proj", "lm_head")):
        case = Case("llama", targets, {"vocab_size": 998, "tie_word_embeddings": True})
        whole = 4 * 998 * 32
        assert largest(parallelize(policy_of(case), TENSOR, world)) <= whole // 2 + 4 * 32
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("macpo.engine.models.head.vocab_shard", lambda weight: None)
            assert largest(parallelize(policy_of(case), TENSOR, world)) >= whole, "the gathered head is seen"


def check_rule(world: World) -> None:
    """Cut by rows, and each rank has one: else the head is gathered."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(6, 4)
    assert vocab_shard(weight) is None
    for placement in (Replicate(), Shard(1)):
        assert vocab_shard(distribute_tensor(weight, mesh, [placement])) is None
    assert vocab_shard(distribute_tensor(weight[:1], mesh, [Shard(0)])) is None
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight = torch.nn.Parameter(distribute_tensor(weight[:1], mesh, [Shard(0)]))
    gathered = linear_head(layer)
    assert gathered.shard is None and gathered.weight.shape == (1, 4)
    shard = vocab_shard(distribute_tensor(weight[:5], mesh, [Shard(0)]))
    assert shard is not None and (shard.first, shard.count) == [(0, 3), (3, 2)][world.rank]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.tensor([1.0, -2.0], dtype=dtype) * (world.rank + 1)
        assert shard.maximum(x).tolist() == [2, -2] and shard.total(x).tolist() == [3, -6]
        assert shard.total(x).dtype == dtype
        assert x.tolist() == [world.rank + 1, -2 * world.rank - 2], "it is left as it was"
