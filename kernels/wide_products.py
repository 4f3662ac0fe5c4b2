"""16-bit products on CPUs that have none: in float32, rounded once at the end.

torch emulates them there, which takes several times as long as float32 does. Both sum in float32.

T rows, I inputs, O outputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula

MIN_ROWS = 8
"""Fewer rows are multiplied in 16 bits: the weight would be widened for each of them."""


def _emulated() -> frozenset[torch.dtype]:
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    has = {torch.bfloat16: ops._is_mkldnn_bf16_supported(), torch.float16: ops._is_mkldnn_fp16_supported()}
    return frozenset(dtype for dtype, native in has.items() if not native)


EMULATED = _emulated()
"""The dtypes in which this machine's CPU has no products."""


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch emulates products of this dtype on the device."""
    return device.type == "cpu" and dtype in EMULATED


def widens(x: Tensor) -> bool:
    """Whether products of the rows of x [T, I] are best computed in float32."""
    return x.shape[0] >= MIN_ROWS and is_emulated(x.dtype, x.device)


def wide_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Within the block `torch.nn.functional.linear` is `wide_linear`, whosever code calls it.

    Does nothing where products of this dtype are not emulated on the device.
    """
    return _WideProducts() if is_emulated(dtype, device) else nullcontext()


class _WideProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = func is linear and not kwargs and all(type(x) in (Tensor, torch.nn.Parameter) for x in args[:2])
        return wide_linear(*args) if plain else func(*args, **(kwargs or {}))


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b; x [..., I], weight [O, I], bias [O] of one dtype -> [..., O]."""
    flat = x.reshape(-1, x.shape[-1])
    if not widens(flat):
        return linear(x, weight, bias)
    y: Tensor = _wide_mm(flat, weight.t(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.mm(left.float(), right.float())
    return (wide if bias is None else wide.add_(bias)).to(left.dtype)


# An operator, so that selective checkpointing keeps its 16-bit result, and autograd no float32 copies.
_wide_mm = torch.library.custom_op("macpo::wide_mm", _product, mutates_args=())
WIDE_MM = torch.ops.macpo.wide_mm.default


@_wide_mm.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    left, right = ctx.saved_tensors
    needs_left, needs_right, needs_bias = ctx.needs_input_grad
    return (
        _wide_mm(dy, right.t(), None) if needs_left else None,
        _wide_mm(left.t(), dy, None) if needs_right else None,
        dy.sum(0, dtype=torch.float32).to(dy.dtype) if needs_bias else None,
    )


_wide_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.macpo.wide_mm)
def _flops(left: Any, right: Any, bias: Any, **_: Any) -> int:
    """FLOP from the operands' shapes."""
    return 2 * int(left[0] * left[1] * right[1])
