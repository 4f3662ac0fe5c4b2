"""Predicted memory against tensors counted in real steps: every storage that is alive, by torch's own dispatch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import model_of
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings, PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, pack
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.flops import ModelShape
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.planning.dry_run import Recorder
from macpo.engine.planning.memory import Setup, checkpoint_bytes, head_bytes, memory, tensor_config
from macpo.engine.training.objectives import preference
from macpo.engine.training.optim import Optimizer
from macpo.kernels import VocabShard
from macpo.kernels.linear_logp.head import Head, Needs
from macpo.kernels.linear_logp.shard import ShardHead
from macpo.kernels.pair_loss import chunked
from macpo.kernels.pair_loss.losses import LossSettings

ALL = LoraSettings(rank=8, target_modules="all-linear")
SOME = LoraSettings()
FULL = FullSettings()


def groups_of(count: int, vocab: int) -> list[PrefixGroup]:
    """Ragged pairs, prompts of 30 to 90 tokens and responses of 15 to 45."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(draw.randint(low, high))]

    return [PrefixGroup(ids(30, 90), [ids(15, 45), ids(15, 45)]) for _ in range(count)]


@dataclass
class Case:
    """A policy, a packed row of pairs, and what the plan says of them."""

    config: PretrainedConfig
    policy: PolicyModule
    batch: PackedBatch
    setup: Setup
    row: list[tuple[int, list[int]]]

    @property
    def predicted(self) -> Any:
        return memory(self.config, self.setup, self.row, num_rows=2)

    def loss(self) -> torch.Tensor:
        count = len(self.row)
        return preference(PreferenceSettings(), torch.zeros(count, 2))(self.policy, self.batch, count)[0]


@contextmanager
def case_of(
    kind: str, tuning: LoraSettings | FullSettings, checkpointing: Any, dtype: torch.dtype, **sizes: Any
) -> Iterator[Case]:
    """With gradients in place and the row's masks made, as in every micro-batch but the first."""
    model = model_of(kind, max_position_embeddings=512, **sizes).to(dtype).requires_grad_(False)
    outer: Any = model
    if isinstance(tuning, LoraSettings):
        outer = lora.new_adapter(model, tuning, seed=0)
    else:
        model.requires_grad_(True)
    parallel = ParallelSettings(checkpointing=checkpointing)
    policy = parallelize(PolicyModule(outer), parallel, World())
    groups = groups_of(6, sizes["vocab_size"])
    (batch,) = pack(groups, max_tokens=10**6)
    row = [(len(g.prompt_ids), [len(r) for r in g.responses]) for g in groups]
    case = Case(model.config, policy, batch, Setup(tuning, parallel, dtype, "cpu"), row)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    with attention_hook(policy.base):
        with torch.no_grad():
            case.loss()
        yield case


def sizes(layers: int, hidden: int, vocab: int = 500, **others: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": max(1, hidden // 64)}
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": vocab}
    return heads | shape | others


CASES: dict[str, tuple[str, LoraSettings | FullSettings, str, torch.dtype, dict[str, Any]]] = {
    "full-4x128": ("llama", FULL, "off", torch.float32, sizes(4, 128)),
    "some-2x64": ("llama", SOME, "off", torch.float32, sizes(2, 64)),
    "lora-8x256": ("llama", ALL, "off", torch.float32, sizes(8, 256, 2000)),
    "full-3x512": ("llama", FULL, "off", torch.float32, sizes(3, 512, 2000)),
    "bf16": ("llama", ALL, "off", torch.bfloat16, sizes(4, 128)),
    "lora-checkpointed": ("llama", ALL, "full", torch.float32, sizes(4, 128)),
    "full-checkpointed": ("llama", FULL, "full", torch.float32, sizes(8, 128)),
    "lora-selective": ("llama", ALL, "selective", torch.float32, sizes(4, 128)),
    "bf16-selective": ("llama", ALL, "selective", torch.bfloat16, sizes(4, 128)),
    "full-selective": ("llama", FULL, "selective", torch.float32, sizes(4, 128)),
    "qwen3": ("qwen3", FULL, "full", torch.float32, sizes(4, 128, head_dim=32)),
    "gemma3": ("gemma3_text", ALL, "off", torch.float32, sizes(2, 128, head_dim=32)),
    "phi3": ("phi3", ALL, "off", torch.float32, sizes(4, 128)),
    "neox": ("gpt_neox", FULL, "off", torch.float32, sizes(4, 128, num_key_value_heads=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_activations_and_states_are_the_counted_tensors(name: str) -> None:
    """Saved tensors within 2%, the worst moment of the backward within 10%, states to the byte."""
    kind, tuning, checkpointing, dtype, shape = CASES[name]
    with case_of(kind, tuning, checkpointing, dtype, **shape) as case:
        predicted = case.predicted
        trained = case.policy.trainable_parameters().values()
        gradients = [p.grad for p in trained if p.grad is not None]
        with Recorder((*case.policy.parameters(), *case.policy.buffers(), *gradients)) as recorder:
            loss = case.loss()
            saved = recorder.live
            recorder.peak = saved
            loss.backward()
            backward = recorder.peak
        assert sum(p.nbytes for p in case.policy.parameters()) == pytest.approx(predicted.weights, rel=1e-6)
        assert sum(g.nbytes for g in gradients) == pytest.approx(predicted.gradients, rel=1e-6)
        optimizer = Optimizer(case.policy.trainable_parameters(), PreferenceSettings())
        moments = [t for name, t in optimizer.tensors().items() if name.startswith("exp_avg")]
        assert sum(t.nbytes for t in moments) == predicted.optimizer
    itemsize, hidden, vocab = dtype.itemsize, shape["hidden_size"], shape["vocab_size"]
    head = itemsize * hidden * (case.batch.rows.numel() + (vocab if isinstance(tuning, FullSettings) else 0))
    assert predicted.saved + head == pytest.approx(saved, rel=0.02)
    states = predicted.weights + predicted.gradients + predicted.optimizer + predicted.pooled  # no cache here
    assert max(size for phase, size in predicted.phases if "backward" in phase) - states == pytest.approx(
        backward, rel=0.10
    )


@pytest.mark.parametrize("tuning", [ALL, FULL])
@pytest.mark.parametrize("tensor", [1, 3])
def test_head_buffers_are_the_counted_tensors(tuning: Any, tensor: int) -> None:
    """Within 10%: the loss itself, without the operator around it that hides its buffers.

    What torch's row kernels need in passing is the difference: 4 MiB.
    """
    vocab, hidden, pairs, chunk = 30_000 * tensor, 64, 10, 400
    shape = ModelShape.of(model_of("llama", hidden_size=hidden, vocab_size=vocab).config)
    bounds = list(range(0, 40 * (2 * pairs + 1), 40))
    states, weight = torch.randn(bounds[-1], hidden), torch.randn(30_000, hidden)
    target = torch.randint(vocab, (bounds[-1],))
    needs = Needs(True, isinstance(tuning, FullSettings), False, False, False)
    head = Head(weight, None, None, None, 1.0, 1.0, None, "torch")
    if tensor > 1:  # what the others would add has the size of what is there
        shard = VocabShard(vocab, 0, tensor, maximum=torch.clone, total=torch.clone)
        head = ShardHead(weight, None, None, None, 1.0, 1.0, None, "torch", shard=shard)
    settings = LossSettings("sigmoid", 0.1, 0.0, None, None, 0.0)
    with Recorder((states, weight, target)) as recorder:
        of_pairs = chunked.Pairs(bounds, torch.zeros(2 * pairs), settings, pairs, states.new_empty(0))
        chunked.pair_loss(head, states, target, of_pairs, needs, chunk)
    setup = Setup(tuning, ParallelSettings(tensor=tensor), torch.float32, "cpu", ranks=tensor)
    predicted, _ = head_bytes(shape, bounds[-1], setup, chunk_rows=chunk)
    assert predicted == pytest.approx(recorder.peak + states.nbytes, rel=0.10)  # the rows are given to the loss


def test_shards_hold_their_part() -> None:
    """Eight ranks that exist in name only: this rank's shards are the plan's weights, its gradients as many bytes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        model = model_of("llama", **sizes(2, 128)).to(torch.bfloat16).requires_grad_(False)
        wrapped = lora.new_adapter(model, ALL, seed=0)
        parallel = ParallelSettings(sharding="shard")
        config = model.config
        policy = parallelize(PolicyModule(wrapped), parallel, World(0, 8))
        local = [p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters()]
    finally:
        dist.destroy_process_group()
    predicted = memory(config, Setup(ALL, parallel, torch.bfloat16, "cpu", ranks=8), [(20, [10, 10])])
    assert sum(p.nbytes for p in local) == pytest.approx(predicted.weights, rel=0.02)
    assert sum(p.nbytes for p in local if p.dtype == torch.float32) == pytest.approx(predicted.gradients, rel=0.02)


def test_what_lowers_memory_and_what_it_costs() -> None:
    config = model_of("llama", **sizes(6, 256)).config
    row = [(60, [30, 30])] * 8

    def peak(tuning: Any = FULL, ranks: int = 8, **parallel: Any) -> Any:
        return memory(config, Setup(tuning, ParallelSettings(**parallel), ranks=ranks), row, num_rows=2)

    whole = peak()
    assert peak(sharding="shard").optimizer == whole.optimizer / 8
    assert peak(sharding="hybrid", ranks=16).optimizer == whole.optimizer / 8
    assert peak(checkpointing="full").saved < peak(checkpointing="selective").saved < whole.saved
    offloaded = peak(offload_activations=True)
    assert offloaded.saved < whole.saved and offloaded.host > 0
    assert peak(tensor=2).weights < 0.6 * whole.weights
    assert peak(tensor=2).gathered < 0.6 * whole.gathered, "no rank gathers the head"
    quantised = LoraSettings(quantization="nf4")
    assert peak(quantised).weights < 0.6 * peak(SOME).weights
    assert peak(SOME).gradients < 0.1 * whole.gradients


def test_checkpoints_are_weights_and_moments_of_what_trains() -> None:
    config = model_of("llama", **sizes(2, 64)).config
    shape = ModelShape.of(config)
    assert checkpoint_bytes(config, Setup(FULL)) == 12 * shape.num_parameters
    assert checkpoint_bytes(config, Setup(ALL)) == 12 * shape.adapter_parameters(8, "all-linear")


def test_a_split_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads is 2, which 4 ranks do not divide"):
        tensor_config(model_of("llama", **sizes(2, 128)).config, 4)
