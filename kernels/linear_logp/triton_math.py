"""Functions that Triton kernels share; for the head from a product to its logit, from partial sums to a log-prob.

A row is summed as (m, rest): m the largest logit, rest the sum of exp(y - m) over all entries but the target.
Keeping the target apart costs one comparison an entry and keeps 1 - p of a confident row to full relative accuracy:
1 - p = rest / (rest + e_t) and log p = -log1p(rest / e_t), with e_t = exp(y_t - m), never 1 - (something near 1).
"""

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


@triton.jit
def cap(x):
    """tanh(x) and its slope 1 - tanh(x)**2, each to a few units in the last place, of any float32 tensor.

    With e = exp(-2|x|): tanh = (1 - e) / (1 + e), and the slope 4e / (1 + e)**2 does not cancel where tanh is near 1.
    Below |x| = 0.35 the numerator would cancel; there the odd series to x**13 is exact to 1e-9.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = 62.0 / 2835.0 + x2 * (-1382.0 / 155925.0 + x2 * (21844.0 / 6081075.0))
    series = 1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * series)))
    value = tl.where(size < 0.35, x * series, tl.where(x < 0, -far, far))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def logit(z, scale, softcap, CAPPED: tl.constexpr):
    """Logit of the product z (bias already added), and d logit / d z."""
    y = z * scale
    if CAPPED:
        capped, slope = cap(y / softcap)
        y = softcap * capped
        slope = slope * scale
    else:
        slope = scale
    return y, slope


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 by 2 atanh(w), w = x / (2 + x) <= 1/3: relative error below 1e-7."""
    w = x / (2.0 + x)
    w2 = w * w
    series = 1.0 / 9.0 + w2 * (1.0 / 11.0 + w2 * (1.0 / 13.0 + w2 * (1.0 / 15.0)))
    series = 1.0 + w2 * (1.0 / 3.0 + w2 * (1.0 / 5.0 + w2 * (1.0 / 7.0 + w2 * series)))
    return 2.0 * w * series


@triton.jit
def finish(m, rest, target_logit):
    """(log p, logsumexp, e_t + rest) of rows from their maximum, the sum of the others and the target's logit.

    log p <= 0 and logsumexp >= m whatever the rounding: e_t is at most 1, the sum at least one term of 1.
    """
    gap = tl.minimum(target_logit - finite_or_zero(m), 0.0)
    # min() of a GPU drops NaN; a NaN target must stay one.
    gap = tl.where(target_logit == target_logit, gap, target_logit)
    e_t = tl.exp(gap)
    total = rest + e_t
    log_total = tl.log(total)  # total >= 1, but for rows of -inf, whose log-prob is NaN as in torch
    log_total = tl.where((total > 0) & (log_total < 0), 0.0, log_total)
    confident = rest < e_t  # so p > 1/2, and the target's logit is m
    little = log1p(tl.where(confident, rest, 0.0) / tl.where(confident, e_t, 1.0))
    logp = tl.where(confident, -little, gap - log_total)
    return logp, m + tl.where(confident, little, log_total), total


@triton.jit
def finish_above(base, rest, target_logit):
    """`finish` with any base near which no exponential overflows, such as the target's logit itself."""
    gap = target_logit - base
    e_t = tl.exp(gap)
    total = rest + e_t
    confident = rest < e_t  # so p > 1/2
    little = log1p(tl.where(confident, rest, 0.0) / tl.where(confident, e_t, 1.0))
    log_total = tl.log(total)
    logp = tl.where(confident, -little, tl.minimum(gap - log_total, 0.0))
    logp = tl.where(total == total, logp, total)  # min() of a GPU drops NaN
    return logp, tl.where(confident, target_logit + little, base + log_total), total


@triton.jit
def load_block(
    operand, row, col, num_rows, num_cols, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_R, BLOCK_C] of a row-major matrix from (row, col) on, 0 beyond its columns; by descriptor or pointer."""
    if TMA:
        block_rc = operand.load([row, col])
    else:
        # Rows beyond the end read the last row again: they are masked where results are stored, so only columns,
        # over which the product sums, need a mask here.
        row_r = tl.minimum(row + tl.arange(0, BLOCK_R), num_rows - 1).to(tl.int64)
        col_c = col + tl.arange(0, BLOCK_C)
        block_rc = tl.load(
            operand + row_r[:, None] * stride + col_c[None, :], mask=(col_c < num_cols)[None, :], other=0.0
        )
    return block_rc
