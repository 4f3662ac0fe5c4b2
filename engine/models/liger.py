"""Liger's Triton kernels for RMSNorm, RoPE and the gated MLP (arXiv 2410.10989), on GPUs where they are installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.config import ParallelSettings

_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the head and its loss are macpo.kernels'


def why_not(model_type: str, settings: ParallelSettings, device: torch.device) -> str | None:
    """Why Liger's modules are not used; None if they are."""
    if settings.liger == "off":
        return "compute.parallel.liger is off"
    if device.type != "cuda":
        return f"its kernels do not run on {device.type}"
    if settings.tensor > 1:
        return "its kernels do not take the tensors of tensor parallelism"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return None if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has none for {model_type}"


def use_liger(model: PreTrainedModel, settings: ParallelSettings, device: torch.device) -> bool:
    """Put Liger's kernels into the model's modules unless `why_not` gives a reason; returns whether it did."""
    if why_not(model.config.model_type, settings, device) is not None:
        return False
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    family = vars(sys.modules[type(model).__module__])
    before = dict(family)
    _apply_liger_kernel_to_instance(model, **_OURS)
    # Liger also replaces the family's classes and its RoPE for every model of this process: classes are put back, and
    # RoPE, which is a function of the family, keeps the original for CPU tensors.
    rope = family.get("apply_rotary_pos_emb")
    for name, value in before.items():
        family[name] = value
    original = before.get("apply_rotary_pos_emb")
    if rope is not None and original is not None and rope is not original and not hasattr(original, "on_cpu"):
        family["apply_rotary_pos_emb"] = _Rope(rope, original)
    return True


class _Rope:
    """RoPE, by Liger's kernel on GPUs and the family's own function on CPUs."""

    def __init__(self, on_gpu: Any, on_cpu: Any) -> None:
        self.on_gpu, self.on_cpu = on_gpu, on_cpu

    def __call__(self, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.on_gpu if q.is_cuda else self.on_cpu)(q, *args, **kwargs)
