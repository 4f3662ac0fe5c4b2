"""Linear layers over weights in a packed layout, for decode steps on CPUs.

A decode step multiplies a few rows by every weight, and torch rearranges a plain weight in each product: for a head of
32,000 tokens that is 2 to 7 times slower at 1 to 64 rows than over a copy that was rearranged once (LOG.md). In float32
on a CPU with AVX-512 the copy is in panels (`native.Panels`), else in oneDNN's layout. The copies exist only during a
run of the generator, so they never outlive a change of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from macpo.engine.hardware import host_memory
from macpo.kernels import native

MIN_ELEMENTS = 2**12
"""Smallest weight that is packed, in elements."""
MIN_STEPS = 8
"""Fewest decode steps that pay for the copies."""
MEMORY_SHARE = 0.125
"""Share of the machine's memory that the copies may take."""
MAX_PANEL_ROWS = 256
"""Above this number of rows the plain product is as fast as the one over panels."""


@contextmanager
def packed_linears(model: nn.Module, num_steps: int) -> Iterator[int]:
    """Makes a model's nn.Linear layers on the CPU multiply by packed copies of their weights; yields the copies' bytes.

    Args:
        model: frozen meanwhile, under no_grad. Its peft layers use peft's own forward, and so these layers.
        num_steps: number of decode steps that will follow.
    """
    patched: list[nn.Module] = []
    dtypes = packed_dtypes()
    left = _bytes_at_most() if num_steps >= MIN_STEPS and dtypes else 0
    total = left
    try:
        for module in model.modules():
            if isinstance(module, nn.Linear) and _fits(module, dtypes) and module.weight.nbytes <= left:
                forward, num_bytes = packed_product(module.weight, module.bias)
                left -= num_bytes
                vars(module)["forward"] = forward
                patched.append(module)
        for module in model.modules():
            if isinstance(module, LoraLinear) and module.base_layer in patched:
                vars(module)["forward"] = partial(LoraLinear.forward, module)
                patched.append(module)
        yield total - left
    finally:
        for module in patched:
            vars(module).pop("forward", None)


def packed_dtypes() -> set[torch.dtype]:
    """The dtypes with a packed product on this machine; oneDNN has none in bfloat16 without AVX-512 or the like."""
    onednn = torch.backends.mkldnn.is_available()
    dtypes = {torch.float32} if onednn or native.has_panels() else set()
    return dtypes | ({torch.bfloat16} if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())


def _fits(module: nn.Linear, dtypes: set[torch.dtype]) -> bool:
    """Whether a layer is plain, on the CPU, of a dtype that has a packed product, and not patched yet."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return plain and weight.device.type == "cpu" and weight.dtype in dtypes and weight.numel() >= MIN_ELEMENTS


def packed_product(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], int]:
    """Returns x [..., I] -> x W' + b [..., O] over a copy of weight [O, I] on a CPU, and the copy's bytes.

    The dtype is one of `packed_dtypes`.
    """
    weight = weight.detach()
    if weight.dtype == torch.float32 and native.has_panels():
        panels = native.Panels(weight, bias)
        return partial(panel_product, panels, weight, bias), panels.nbytes
    return partial(onednn_product, onednn_pack(weight), bias), weight.nbytes


def panel_product(panels: native.Panels, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x W' + b; x [..., I] -> [..., O]. Uses the panels for a few rows, weight [O, I] itself for many."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > MAX_PANEL_ROWS:
        return functional.linear(x, weight, bias)
    return panels.product(rows).view(*x.shape[:-1], panels.num_outputs)


def onednn_pack(weight: Tensor) -> Tensor:
    """Copies weight [O, I] into oneDNN's layout, for `onednn_product` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def onednn_product(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x W' + b; x [..., I] -> [..., O]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


def _bytes_at_most() -> int:
    return int(MEMORY_SHARE * host_memory())
