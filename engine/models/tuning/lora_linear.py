"""A linear layer with its LoRA as one product: y = x W' + b + s (x A') B', all of it in the dtype of x.

peft casts x to the adapter's float32: with a 16-bit base every adapted layer then keeps a float32 copy of x for its
backward and runs the adapter's products in float32. Here A and B are rounded to the dtype of x on the way (they are
tiny), x is kept as it is, so that q, k and v keep one tensor between them, and so is u = x A'. With dy the gradient of
y: du = s dy B, dx = dy W + du A, dA = du' x, dB = s dy' u. LoRA: Hu et al., arXiv 2106.09685, section 4.1.

T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import addmm_flop, register_flop_formula

from macpo.kernels.wide_products import widens


def use_fused_lora(model: nn.Module) -> None:
    """Make the model's peft LoRA layers run through `lora_linear`, in place; names, weights and files stay."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = FusedLinear


class FusedLinear(PeftLinear):
    """peft's layer computed by `lora_linear`, or by peft's own forward if `_plain` names no adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._plain(x)
        if name is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base: Any = self.base_layer
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        return lora_linear(x, base.weight, base.bias, a.weight, b.weight, float(self.scaling[name]))

    def _plain(self, x: Tensor) -> str | None:
        """The one active adapter if it is plain LoRA without dropout over a frozen nn.Linear in the dtype of x.

        Returns None if tensor parallelism has split the layer, and under autocast, which chooses dtypes itself.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged:
            return None
        (name,), base = names, self.base_layer
        if type(base) is not nn.Linear or isinstance(base.weight, DTensor) or base.weight.dtype != x.dtype:
            return None
        trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        if trains or name in self.lora_variant or self.lora_bias[name]:
            return None
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        return None if autocast or type(self.lora_dropout[name]) is not nn.Identity else name


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute x W' + b + scaling (x A') B', once differentiable in x, a and b; keeps x, x A' and the weights.

    Args:
        x: [..., I] of any floating dtype.
        weight: [O, I], dtype of x; frozen.
        bias: [O], dtype of x; frozen.
        a, b: [r, I] and [O, r] of any floating dtype, which their gradients have too.

    Returns:
        [..., O], dtype of x.

    Raises:
        RuntimeError: shapes or dtypes that do not fit together; a second derivative.
    """
    y: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    """x [T, I] -> y [T, O]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        y, u = _products_at_once(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, u, weight, a, b)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, u, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        if widens(dy):
            dy, u = dy.float(), u.float()
        du = torch.mm(dy, b.to(dy.dtype)).mul_(ctx.scaling)
        dx = torch.mm(dy, weight.to(dy.dtype)).addmm_(du, a.to(dy.dtype)) if needs_x else None
        da = _mm(du.t(), x.to(dy.dtype), a.dtype) if needs_a else None
        db = _mm(dy.t(), u, b.dtype).mul_(ctx.scaling) if needs_b else None
        return None if dx is None else dx.to(x.dtype), None, None, da, db, None


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on a GPU float32 sums of 16-bit products are not rounded on the way."""
    if left.is_cuda and dtype == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """x [T, I] -> (y [T, O], u = x A' [T, r]); the adapter's part is added to y in place."""
    if widens(x):
        y, u = products(x.float(), weight.float(), None if bias is None else bias.float(), a, b, scaling)
        return y.to(x.dtype), u.to(x.dtype)
    y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    u = torch.mm(x, a.to(x.dtype).t())
    return y.addmm_(u, b.to(x.dtype).t(), alpha=scaling), u


# One operator, so that selective checkpointing keeps the complete y, and u.
_products_at_once = torch.library.custom_op("macpo::lora_linear", products, mutates_args=())
LORA_LINEAR = torch.ops.macpo.lora_linear.default


@_products_at_once.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)  # torch counts addmm, but not in place


@register_flop_formula(torch.ops.macpo.lora_linear)
def _flops(x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float, **_: Any) -> int:
    """FLOP from the operands' shapes."""
    return 2 * int(x[0] * (weight[0] * weight[1] + a[0] * (a[1] + b[0])))
