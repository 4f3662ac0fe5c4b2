"""One model over two ranks, and what a block keeps for its backward: everything here only splits sums.

Two gloo ranks run all cases in one job (fork after import); what they write is compared with one process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from macpo.engine import activations, liger, lora, model, parallel
from macpo.engine.attention import attention_hook
from macpo.engine.config import LoraSettings, OptimSettings, ParallelSettings, PreferenceSettings
from macpo.engine.errors import ConfigError
from macpo.engine.model import PolicyModule
from macpo.engine.objectives import preference, reference_logps, sft
from macpo.engine.optim import Optimizer
from macpo.engine.pack import pack
from macpo.engine.parallel import data_world, finish, mesh, parallelize
from macpo.engine.scoring import score
from macpo.engine.trainer import train
from macpo.engine.world import World

PAIRS = some_groups(num_responses=2, count=8)
RATE = 1e-4  # at which Adam's answer to the rounding of a gradient near zero stays below 1e-6
STEPS = 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    architecture: str
    targets: Any = None
    """Of a LoRA; None trains every weight."""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    dtype: torch.dtype = torch.float32
    """What it computes in."""
    micro: int = 1
    """Pairs of a micro-batch."""


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


def run(case: Case, settings: ParallelSettings, world: World | None = None) -> dict[str, Tensor]:
    """STEPS steps on all pairs: losses, norms, whole gradients of the first step, whole weights after the last one."""
    world = world or World()
    policy = parallelize(policy_of(case), settings, world)
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


# --- two ranks ---

SHARD, TENSOR = ParallelSettings(sharding="shard"), ParallelSettings(tensor=2)
HYBRID = ParallelSettings(sharding="hybrid")
EVERYTHING = ParallelSettings(sharding="shard", checkpointing="selective", offload_activations=True)
TIED = Case("llama", changes={"tie_word_embeddings": True})
LORA = Case("qwen3", "all-linear")
SOFTCAP = Case("gemma3_text", changes={"final_logit_softcapping": 5.0})
# (case, settings, ranks of a node): every kind of head and of layer once with FSDP2 and once split
TWO_RANKS: dict[str, tuple[Case, ParallelSettings, int]] = {
    "tied, sharded": (TIED, SHARD, 2),
    "tied, split": (TIED, TENSOR, 2),
    "untied, 1 x 2": (Case("llama"), HYBRID, 2),
    "untied, 2 x 1": (Case("llama"), HYBRID, 1),
    "softcap": (SOFTCAP, SHARD, 2),
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

    def body(world: World) -> None:
        def keep(name: str, result: dict[str, Tensor]) -> None:
            if world.is_main:
                save_file({key: value.contiguous() for key, value in result.items()}, tmp_path / name)

        for name, (case, settings, local) in TWO_RANKS.items():
            os.environ["LOCAL_WORLD_SIZE"] = str(local)
            keep(name, run(case, settings, world))
        keep("bf16", run(Case("llama", dtype=torch.bfloat16), SHARD, world))
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
    assert_mixed_precision(load_file(tmp_path / "bf16"))


def assert_mixed_precision(mixed: dict[str, Tensor]) -> None:
    """Two ranks and one, which is a mesh of one, compute in bfloat16 with float32 weights and gradients."""
    try:
        alone = run(Case("llama", dtype=torch.bfloat16), ParallelSettings())
    finally:
        finish()
    torch.testing.assert_close(mixed["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    exact = run(Case("llama"), ParallelSettings())
    assert 1e-6 < (mixed["losses"] - exact["losses"]).abs().max().item() < 1e-2


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
        model.KEPT_GRADIENT_BYTES = limit
        policy = parallelize(policy_of(TIED), SHARD, world)
        for last in (False, True):
            policy.synchronise(last)
            sft()(policy, batch, 1)[0].backward()
            early = [p.grad is not None for p in policy.parameters()]
            assert all(early) if last or not limit else not any(early)
        sums.append([p.grad.full_tensor() for p in policy.parameters()])  # type: ignore[union-attr]
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


# --- what a block keeps ---


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
    """By the backend that runs the captured graph as it is; inductor takes a minute a case on two cores."""
    monkeypatch.setattr(parallel, "compile_block", lambda block: activations.compile_block(block, backend="aot_eager"))
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


# --- Liger ---


@pytest.mark.parametrize(
    "model_type, settings, device, reason",
    [
        ("llama", ParallelSettings(), "cpu", "do not run on cpu"),
        ("llama", ParallelSettings(liger="off"), "cuda", "is off"),
        ("llama", ParallelSettings(tensor=2), "cuda", "tensor parallelism"),
        ("gpt_neox", ParallelSettings(), "cuda", "none for gpt_neox"),
    ],
)
def test_where_liger_is_not_used(model_type: str, settings: ParallelSettings, device: str, reason: str) -> None:
    pytest.importorskip("liger_kernel")
    assert reason in (liger.why_not(model_type, settings, torch.device(device)) or "")


def test_liger_replaces_modules_of_this_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    patched, other = model_of("llama"), model_of("llama")
    assert not liger.use_liger(patched, ParallelSettings(), torch.device("cpu"))
    try:
        assert liger.use_liger(patched, ParallelSettings(), torch.device("cuda"))
        names = {type(m).__name__ if "forward" not in vars(m) else m._get_name() for m in patched.modules()}
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= names
        changed = {name for name, value in vars(modeling_llama).items() if before.get(name) is not value}
        assert changed == {"apply_rotary_pos_emb"}
        plain = score(PolicyModule(other), PAIRS)  # RoPE of CPU tensors is the family's own
        assert plain[0][0].sum_logp < 0
        assert "forward" not in vars(patched), "the head stays ours"
        assert not liger.use_liger(model_of("gpt_neox"), ParallelSettings(), torch.device("cuda"))
    finally:
        vars(modeling_llama).update(before)


def test_liger_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert liger.why_not("llama", ParallelSettings(), torch.device("cuda")) == "liger-kernel is not installed"
