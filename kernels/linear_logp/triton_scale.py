# mypy: disable-error-code="no-untyped-def"
"""Multiplies kept gradients by the factor of their row, or by one factor: float32 products, rounded once.

torch multiplies 16-bit by float32 tensors at a fifth of an H200's bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.linear_logp.triton_math import narrow
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel

BLOCK = 4096


@triton.jit(do_not_specialize=["width"])
def scale_kernel(p_x, p_out, p_factor, width, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr):
    """BLOCK columns of one row of x [N, width] times factor [N]; in place a factor of 1 leaves the row alone."""
    programs = tl.cdiv(width, BLOCK)  # of a row
    row = (tl.program_id(0) // programs).to(tl.int64)
    col_c = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(p_factor + row)
    if IN_PLACE and factor == 1.0:
        return
    x_c = tl.load(p_x + row * width + col_c, mask=col_c < width, other=0.0).to(tl.float32)
    tl.store(p_out + row * width + col_c, narrow(x_c * factor, p_out.dtype.element_ty), mask=col_c < width)


def scale(x_nc: Tensor, factor_n: Tensor, out_nc: Tensor) -> Tensor:
    """out = x * factor by rows, all contiguous; out may be x. factor is float32 [N]."""
    num_rows, width = x_nc.shape
    if x_nc.numel():
        grid = (num_rows * triton.cdiv(width, BLOCK),)
        scale_kernel[grid](x_nc, out_nc, factor_n, width, BLOCK, out_nc.data_ptr() == x_nc.data_ptr())
    return out_nc


def aot_kernels() -> list[AotKernel]:
    """Every dtype, in place and not."""
    return [
        AotKernel(
            f"linear_logp_scale/{name}" + "/in place" * in_place,
            scale_kernel,
            {"p_x": f"*{name}", "p_out": f"*{name}", "p_factor": "*fp32", "width": "i32"},
            {"BLOCK": BLOCK, "IN_PLACE": in_place},
            aligned=("p_x", "p_out", "p_factor"),
        )
        for name in TRITON_NAMES.values()
        for in_place in (False, True)
    ]
