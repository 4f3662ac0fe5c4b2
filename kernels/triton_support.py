"""Whether Triton kernels can run here, and how each of them is compiled ahead of time.

This module needs torch alone; kernels are in the operators' `triton_impl*.py`, imported only when one is called.
Under TRITON_INTERPRET=1 (set before the first kernel is imported) they run on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

INSTALLED = find_spec("triton") is not None
# The dtypes that the kernels take, by Triton's names.
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The modules that hold Triton kernels; each has `aot_kernels() -> list[AotKernel]`.
KERNEL_MODULES: tuple[str, ...] = (
    "macpo.kernels.linear_logp.triton_impl",
    "macpo.kernels.prefix_attention.triton_impl",
    "macpo.kernels.paged_attention.triton_impl",
    "macpo.kernels.sampling.triton_impl",
)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter instead of a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "yes", "on")


def why_not(device: torch.device | str) -> str:
    """Why Triton kernels cannot take tensors on `device`; empty where they can."""
    kind = torch.device(device).type
    if not INSTALLED:
        return "Triton is not installed; `pip install 'triton>=3.6'`"
    if kind == "cuda" or (kind == "cpu" and interpreted()):
        return ""
    if kind == "cpu":
        return "these are CPU tensors; Triton takes them under TRITON_INTERPRET=1 only, for tests"
    return f"the Triton kernels are for CUDA tensors, these are on {kind}"


@dataclass(frozen=True, slots=True)
class AotKernel:
    """One kernel in one configuration that the code can choose, as the ahead-of-time check compiles it."""

    name: str
    """Kernel and configuration, unique: "prefix_attention_forward/d128/bf16"."""
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not a constexpr: "*bf16", "i32", "fp32"."""
    constexprs: Mapping[str, Any]
    """Value of every constexpr argument, and of arguments that are None."""
    num_warps: int = 4
    num_stages: int = 3
    """As the launch has it; 3 is Triton's own where a launch names none."""
    aligned: tuple[str, ...] = ()
    """Arguments that the launcher passes as multiples of 16 (pointers and strides), as Triton specialises them."""
    wgmma: bool = False
    """Whether sm_90 code must hold wgmma instructions."""
    max_registers: int | None = None
    """The launcher's limit on registers per thread, None without one."""
    max_spill_bytes: int = 0
    """The most bytes of registers that may spill to local memory."""
    capabilities: tuple[int, ...] = field(default=(80, 90, 100))
    """Compute capabilities that the configuration is chosen for."""
    rare: bool = False
    """Whether it differs from a common one by what few models have, so that a quick check may leave it out."""


def aot_kernels() -> list[AotKernel]:
    """Every kernel and configuration of the project; needs Triton, and TRITON_INTERPRET unset."""
    return [kernel for name in KERNEL_MODULES for kernel in import_module(name).aot_kernels()]
