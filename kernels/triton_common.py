# mypy: disable-error-code="no-untyped-def"
"""Triton functions that several operators' kernels call."""

from __future__ import annotations

import triton
import triton.language as tl

from macpo.kernels.triton_support import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def finite_or_zero(m):
    """m where it can be subtracted: rows (or parts of rows) of -inf have their maximum read as 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x rounded to the nearest DTYPE; by hand where the interpreter would cut bits off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32: exact products of 16-bit entries, IEEE products of float32 ones, never TF32."""
    if INTERPRETED:  # which multiplies the bit patterns of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
