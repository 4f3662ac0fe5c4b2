"""Kernels of a decode step, counted on tensors without a GPU: where LoRA decoding is bound by launches, not by work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from architectures import model_of
from kernel_checks import Kernels, as_kernels
from peft import LoraConfig, PeftModel, get_peft_model

from macpo.engine.config import ParallelSettings
from macpo.engine.generation import multilora
from macpo.engine.generation.batch_runner import next_logits
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.pool.attention import PagedDecode
from macpo.engine.generation.pool.blocks import KVPool
from macpo.engine.models import liger
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.tuning import lora_linear
from macpo.engine.models.tuning.lora_linear import use_fused_lora

ROWS = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(layers: int, fused: bool) -> PeftModel:
    """A 16-bit Llama with two adapters on every linear layer, with Liger's modules or without."""
    base = model_of("llama", num_hidden_layers=layers).to(torch.bfloat16)
    if fused:
        assert liger.use_liger(base, ParallelSettings(), torch.device("cuda"))
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    peft.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    use_fused_lora(peft)
    return peft.eval().requires_grad_(False)


@contextmanager
def on_a_gpu(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a GPU would run it: products in 16 bits; Liger's functions and the attention's operators are a kernel each."""

    def attend(self: Any, module: Any, q: Any, k: Any, v: Any, form: Any) -> Any:
        for name in ("write_kv", "paged_attention", "paged_attention_combine"):
            with kernels.as_one(name):
                pass
        return q.new_empty(q.transpose(1, 2).shape)

    with monkeypatch.context() as patch:
        patch.setattr(multilora, "is_emulated", lambda dtype, device: False)
        patch.setattr(lora_linear, "widens", lambda x: False)
        patch.setattr(lora_linear, "_products_at_once", lora_linear.products)  # an operator whose kernels count
        patch.setattr("macpo.engine.models.attention_hook.wide_products", lambda dtype, device: nullcontext())
        patch.setattr(PagedDecode, "attend", attend)
        patch.setattr(liger, "_by_device", as_kernels(kernels))
        yield


def per_layer(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels of one more layer in the forward of a decode step: what a model of two has beyond a model of one."""
    counts = []
    for layers in (1, 2):
        kernels = Kernels()
        with on_a_gpu(kernels, monkeypatch):
            peft = adapted(layers, fused)
            base = peft.get_base_model()
            shapes = {i: CacheShape(2, 8, 8, torch.bfloat16) for i in range(layers)}
            pool = KVPool(ROWS, 16, shapes, torch.device("cpu"))
            tables = torch.zeros(ROWS, 1, dtype=torch.int32)
            context = PagedDecode(pool, tables, torch.ones(ROWS, dtype=torch.int32), torch.arange(ROWS))
            names = {"base": [], "as peft": [], "one": ["default"], "stacked": ["default", "other"]}[kind]
            stacked = StackedAdapters(peft, names) if names else None
            if stacked is not None:
                stacked.assign([names[i % len(names)] for i in range(ROWS)])
            ids = torch.arange(ROWS)
            plain = peft.disable_adapter() if kind == "base" else nullcontext()
            with torch.no_grad(), plain, attention_hook(base), stacked.active() if stacked else nullcontext(), kernels:
                next_logits(base, ids, ids, context, None)
        counts.append(kernels.count)
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("kind", "fused", "most"),
    [
        ("base", True, 18),
        ("one", True, 32),
        ("stacked", True, 40),
        ("stacked", False, 65),  # of a family that Liger does not have, or where it is not installed
    ],
)
def test_a_layer_takes_few_kernels(kind: str, fused: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        pytest.importorskip("liger_kernel")
    assert per_layer(kind, fused, monkeypatch) <= most


def test_the_stacks_spare_the_casts_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two a layer: one adapter's A and B are float32, the base has 16 bits."""
    by_itself, kept = (per_layer(kind, False, monkeypatch) for kind in ("as peft", "one"))
    assert by_itself - kept >= 2 * len(TARGETS)
