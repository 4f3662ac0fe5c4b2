"""16-bit products on CPUs that have none: in float32, rounded once at the end.

torch emulates them there, which takes several times as long as float32 does. Both sum in float32.

T rows, I inputs, O outputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

MIN_ROWS = 8
"""Fewer rows are multiplied in 16 bits: the weight would be widened for each of them."""


def is_emulated(x: Tensor) -> bool:
    """Whether torch emulates products in the dtype of x where x is."""
    return x.device.type == "cpu" and x.dtype in EMULATED


def _emulated() -> frozenset[torch.dtype]:
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    has = {torch.bfloat16: ops._is_mkldnn_bf16_supported(), torch.float16: ops._is_mkldnn_fp16_supported()}
    return frozenset(dtype for dtype, native in has.items() if not native)


EMULATED = _emulated()
"""The dtypes in which this machine's CPU has no products."""


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, once differentiable; x [..., I], weight [O, I], bias [O] of one dtype -> [..., O]."""
    if not _is_wide(x.reshape(-1, x.shape[-1])):
        return linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def _is_wide(x: Tensor) -> bool:
    return x.shape[0] >= MIN_ROWS and is_emulated(x)


def wide_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Within the block `torch.nn.functional.linear` is `wide_linear`, whosever code calls it.

    Does nothing where products of this dtype are not emulated on the device.
    """
    return _WideProducts() if is_emulated(torch.empty(0, dtype=dtype, device=device)) else nullcontext()


class _WideProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = func is linear and not kwargs and all(type(x) in (Tensor, torch.nn.Parameter) for x in args[:2])
        return wide_linear(*args) if plain else func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """Keeps x and the weight as they are, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy_to = dy.float().reshape(-1, dy.shape[-1])
        dx = (dy_to @ weight.float()).to(x.dtype).view_as(x) if needs_x else None
        dw = (dy_to.T @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype) if needs_weight else None
        return dx, dw, dy_to.sum(0).to(weight.dtype) if needs_bias else None
