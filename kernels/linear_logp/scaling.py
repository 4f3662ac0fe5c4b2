"""Multiplies kept gradients in a backward by one factor per row, or by one for all: in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.backend import explain


def scale_rows(x_nh: Tensor, factor_n: Tensor, *, in_place: bool = False) -> Tensor:
    """x [N, H] times factor [N] by rows, in x's dtype; in x's memory with `in_place`."""
    if _by_triton(x_nh):
        from macpo.kernels.linear_logp.triton_scale import scale

        return scale(x_nh, factor_n.float().contiguous(), x_nh if in_place else torch.empty_like(x_nh))
    if in_place:
        return torch.mul(x_nh, factor_n[:, None], out=x_nh)
    return (x_nh * factor_n[:, None]).to(x_nh.dtype)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x of any shape times a scalar tensor, in x's memory."""
    if x.device.type == "cpu":
        value = float(factor)
        return x if value == 1.0 else x.mul_(value)
    if x.is_contiguous() and _by_triton(x):
        scale_rows(x.view(1, -1), factor.reshape(1), in_place=True)
        return x
    return torch.mul(x, with_dimension(factor, x), out=x)


def with_dimension(factor: Tensor, x: Tensor) -> Tensor:
    """A factor that takes part in type promotion, so that it is not rounded to x's dtype."""
    return factor.reshape((1,) * max(1, x.dim()))


def _by_triton(x: Tensor) -> bool:
    """Whether Triton's kernel takes x: on a GPU; traced tensors stay with torch's own operators."""
    return (
        x.is_cuda
        and x.is_contiguous()
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and explain("linear_logp", x.device).backend == "triton"
    )
