"""Kernels of one more layer in a LoRA training step, counted without a GPU: a small model's step is bound by them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from architectures import model_of
from kernel_checks import Kernels, as_kernels

from macpo.engine.config import LoraSettings, ParallelSettings
from macpo.engine.data.pack import PrefixGroup, pack
from macpo.engine.models import liger
from macpo.engine.models.attention_hook import PackedAttention
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora, lora_linear
from macpo.engine.training.objectives import sft

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def counts(layers: int, fused: bool, patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Kernels of the forward and of the backward of one micro-batch."""
    kernels = Kernels()
    patch.setattr(liger, "_by_device", as_kernels(kernels))
    base = model_of("llama", num_hidden_layers=layers).to(torch.bfloat16).requires_grad_(False)
    if fused:
        assert liger.use_liger(base, ParallelSettings(), torch.device("cuda"))
    policy = PolicyModule(lora.new_adapter(base, LoraSettings(rank=4, target_modules=TARGETS), seed=0))
    (batch,) = pack([PrefixGroup([3, 4, 5], [[6, 7], [8, 9, 10]])], max_tokens=64)

    class Attention(torch.autograd.Function):
        """One kernel forwards, two backwards (dq; dk and dv)."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            kernels.names["attention"] += 1
            ctx.shapes = q.shape, k.shape, v.shape
            return q.new_empty(q.transpose(1, 2).shape)

        @staticmethod
        def backward(ctx: Any, do: Any) -> Any:
            kernels.names["attention backward"] += 2
            return tuple(do.new_empty(shape) for shape in ctx.shapes)

    patch.setattr(PackedAttention, "attend", lambda self, module, q, k, v, form: Attention.apply(q, k, v))
    patch.setattr(lora_linear, "_products_at_once", lora_linear.products)
    patch.setattr(lora_linear, "widens", lambda x: False)
    patch.setattr("macpo.engine.models.attention_hook.wide_products", lambda dtype, device: nullcontext())
    kernels.names.clear()  # of the forwards that compared the paths
    with kernels:
        loss, _ = sft()(policy, batch, 1)
        forward = kernels.count
        loss.backward()
    return forward, kernels.count - forward


@pytest.mark.parametrize(("fused", "most"), [(True, (44, 95)), (False, (70, 138))])
def test_a_layer_of_a_lora_step_takes_few_kernels(fused: bool, most: tuple[int, int]) -> None:
    if fused:
        pytest.importorskip("liger_kernel")
    found = []
    for layers in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            found.append(counts(layers, fused, patch))
    forward, backward = (b - a for a, b in zip(*found, strict=True))
    assert forward <= most[0] and backward <= most[1], (forward, backward)
