"""Liger's kernels belong to a model: whoever uses its weights runs the same modules, and no other model notices."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, model_of
from torch import nn

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings
from macpo.engine.distributed.world import World
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import liger
from macpo.engine.models.activations import blocks_of, compile_block
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize

CUDA = torch.device("cuda")
IDS = torch.arange(3, 9)[None]


@pytest.fixture
def rope_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As if 4-dimensional CPU tensors were on a GPU: Liger's RoPE is called, notes it and is the family's own."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import monkey_patch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    calls: list[int] = []

    def rope(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return apply_rotary_pos_emb(*args, **kwargs)

    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", rope)
    monkeypatch.setattr(liger, "runs_on", lambda x: x.dim() == 4)
    yield calls


def forwards(model: nn.Module) -> dict[str, object]:
    """The function that each module runs; adapters wrap layers, whose names then differ."""
    found = {}
    for name, module in model.named_modules():
        if ".lora_" not in name and "proj" not in name:
            own = vars(module).get("forward")
            found[name.removeprefix("base_model.model.")] = getattr(own, "__code__", type(module).forward)
    return {name: found[name] for name in found if name not in ("", "base_model")}


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


def test_liger_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert liger.why_not("llama", ParallelSettings(), CUDA) == "liger-kernel is not installed"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_liger_changes_this_model_and_nothing_of_its_family(name: str) -> None:
    """CPU tensors go the family's way to the bit; modules and names stay."""
    pytest.importorskip("liger_kernel")
    model = model_of(name)
    family = sys.modules[type(model).__module__]
    before, names, modules = dict(vars(family)), list(model.state_dict()), list(model.modules())
    with torch.no_grad():
        plain = model(IDS).logits
        used = liger.use_liger(model, ParallelSettings(), CUDA)
        assert used == (name != "gpt_neox")
        assert torch.equal(model(IDS).logits, plain)
    changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert bool(changed) == used and "forward" not in vars(model), "the head stays ours"
    assert dict(vars(family)) == before
    assert list(model.state_dict()) == names and list(model.modules()) == modules


def test_rope_is_that_of_the_model_and_of_its_copies(rope_calls: list[int]) -> None:
    model, other = model_of("llama"), model_of("llama")
    assert liger.use_liger(model, ParallelSettings(), CUDA)
    with torch.no_grad():
        plain = other(IDS).logits
        assert not rope_calls, "another model of the family"
        twin = copy.deepcopy(model)
        assert all(layer.self_attn.forward.__self__ is layer.self_attn for layer in twin.model.layers)
        assert torch.equal(twin(IDS).logits, plain) and len(rope_calls) == 2
        for block in blocks_of(twin):
            compile_block(block, "aot_eager")
        torch.testing.assert_close(twin(IDS).logits, plain)
    assert len(rope_calls) == 4, "compiled blocks call it too"


def test_scoring_generation_and_training_run_the_same_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    model_of("llama").save_pretrained(tmp_path)
    decide = liger.why_not
    monkeypatch.setattr(liger, "why_not", lambda kind, settings, device: decide(kind, settings, CUDA))
    kinds: dict[str, ParallelSettings] = {"on": ParallelSettings(), "off": ParallelSettings(liger="off")}
    found = {}
    for kind, settings in kinds.items():  # also one after the other in one process
        models = ModelCache(parallel=settings)
        ref = PolicyRef(str(tmp_path))
        scored = models.policy(ref)  # also what a Generator is given
        adapted, full = (
            parallelize(models.policy(ref, tuning), settings, World())
            for tuning in (LoraSettings(rank=2), FullSettings())
        )
        spread = models.policy(ref, spread=True)
        found[kind] = forwards(scored.base)
        assert found[kind] == forwards(full.base) == forwards(spread.base) == forwards(adapted.base)
    differ = {name.rpartition(".")[2] for name, function in found["on"].items() if found["off"][name] is not function}
    assert differ == {"self_attn", "mlp", "norm", "input_layernorm", "post_attention_layernorm"}
