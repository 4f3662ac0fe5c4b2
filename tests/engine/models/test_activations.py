"""What a block keeps for its backward, compiled blocks, a merged adapter: nothing changes the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import model_of
from parallel_cases import LORA, PAIRS, TIED, Case, policy_of, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from macpo.engine.config import ParallelSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models import activations
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score
from macpo.engine.training.objectives import sft
from macpo.engine.training.reference import reference_logps
from macpo.kernels import use_backend


@pytest.mark.parametrize("case", [TIED, LORA], ids=["full", "lora"])
def test_what_is_kept_does_not_change_a_bit(case: Case) -> None:
    plain = run(case, ParallelSettings())
    for changes in (
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"offload_activations": True},
        {"checkpointing": "full", "offload_activations": True},
    ):
        found = run(case, ParallelSettings.model_validate(changes))
        different = [name for name, tensor in plain.items() if not torch.equal(found[name], tensor)]
        assert not different, (changes, different)


def test_checkpointing_keeps_less_and_selective_repeats_no_product() -> None:
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    saved_bytes, products = {}, {}
    for kind in ("off", "selective", "full"):
        policy = parallelize(policy_of(TIED), ParallelSettings.model_validate({"checkpointing": kind}), World())
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss, _ = sft()(policy, batch, 1)
            loss.backward()
        saved_bytes[kind] = sum(size for address, size in seen.items() if address not in weights)
        counts = counter.get_flop_counts()["Global"]
        products[kind] = sum(flops for op, flops in counts.items() if "mm" in str(op))
    assert saved_bytes["full"] < saved_bytes["off"] / 4
    assert products["off"] == products["selective"] < products["full"]


def test_offloading_copies_activations_once_and_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []
    pack_tensor = activations._HostStore.pack

    def noted(store: Any, tensor: Tensor) -> Any:
        before = len(store._copies)
        packed = pack_tensor(store, tensor)
        if len(store._copies) > before:
            copied.append(tensor)
        return packed

    monkeypatch.setattr(activations._HostStore, "pack", noted)
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    policy = parallelize(policy_of(TIED), ParallelSettings(offload_activations=True), World())
    loss, _ = sft()(policy, batch, 1)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert len(copied) > 20 and not any(t.untyped_storage().data_ptr() in weights for t in copied)
    loss.backward()


def test_compiled_blocks_are_exact_and_one_graph_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the backend that runs the captured graph unchanged; inductor takes a minute per case on two cores."""
    monkeypatch.setattr(
        "macpo.engine.models.parallelize.compile_block",
        lambda block: activations.compile_block(block, backend="aot_eager"),
    )
    graphs = torch._dynamo.utils.counters["stats"]
    case = Case("llama", ("q_proj", "down_proj"))
    plain = run(case, ParallelSettings())
    before = graphs["unique_graphs"]
    found = run(case, ParallelSettings(compile=True, checkpointing="selective", offload_activations=True))
    assert set(found) == set(plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    made = graphs["unique_graphs"] - before
    # the first block's input takes no gradient, because the embedding is frozen
    assert made <= 2, f"{made} graphs for 8 lengths and two blocks"
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_attention_plan_is_made_once_a_batch(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that alternate between two windows need two; each compiled block is a graph of its own."""
    triton_plan = pytest.importorskip("macpo.kernels.prefix_attention.triton_plan")
    calls: list[int | None] = []
    make = triton_plan.make
    monkeypatch.setattr(triton_plan, "make", lambda *args: calls.append(args[3]) or make(*args))
    batches = [pack(PAIRS[:1], max_tokens=1 << 20)[0] for _ in range(3)]
    with use_backend("triton"):
        policy = PolicyModule(model_of("gemma3_text").requires_grad_(False))
        plain = policy.token_logps(batches[0])
        for block in activations.blocks_of(policy.base) if compiled else ():
            activations.compile_block(block, backend="aot_eager")
        calls.clear()
        with torch.no_grad():
            for batch in batches[1:]:
                torch.testing.assert_close(policy.token_logps(batch), plain, rtol=1e-5, atol=1e-5)
    assert sorted(calls, key=str) == [5, 5, None, None]
    torch._dynamo.reset()


def test_merged_adapter_equals_adapter() -> None:
    policy = policy_of(LORA)
    with_adapter = reference_logps(score(policy, PAIRS))
    merged = PolicyModule(policy.model.merge_and_unload())
    torch.testing.assert_close(reference_logps(score(merged, PAIRS)), with_adapter, rtol=1e-5, atol=1e-4)
    plain = reference_logps(score(PolicyModule(model_of("qwen3")), PAIRS))
    assert (plain - with_adapter).abs().max() > 0.1


def test_a_block_that_runs_again_in_the_backward_still_has_the_hook() -> None:
    """train() holds the hook over forward and backward; a caller who does not gets the same gradients."""
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    grads = []
    for held in (True, False):
        policy = parallelize(policy_of(TIED), ParallelSettings(checkpointing="full"), World())
        loss, _ = sft()(policy, batch, 1)
        if held:
            with attention_hook(policy.base):
                loss.backward()
        else:
            loss.backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
