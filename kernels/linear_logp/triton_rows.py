"""Kernels that walk rows of float32 products: log-prob, logsumexp and gradient. Launched by `triton_impl`.

The first pass walks a row from its end, the second from its start, so that what the second reads first is what the
first left in the cache last.
Legend: n rows, v vocabulary, s parts of a row; r, c lines and columns of a tile, a stretch of BLOCK_R * BLOCK_C
consecutive entries of one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.linear_logp.triton_math import finish, finite_or_zero, logit, narrow

COMBINE_ROWS, COMBINE_PARTS = 32, 64  # rows and parts that the combining kernel holds at once


@triton.jit
def load_products(p_row, p_bias, col, m_col):
    """Products plus bias of some columns of a row."""
    z = tl.load(p_row + col, mask=m_col, other=0.0)
    if p_bias is not None:
        z += tl.load(p_bias + col, mask=m_col, other=0.0)
    return z


@triton.jit
def load_target(p_row, p_bias, target, vocab, scale, softcap, CAPPED: tl.constexpr):
    """The target's logit; NaN where the target is no token, so that the mistake is seen."""
    known = (target >= 0) & (target < vocab)
    z = tl.load(p_row + target, mask=known, other=float("nan"))
    if p_bias is not None:
        z += tl.load(p_bias + target, mask=known, other=0.0)
    y, _ = logit(z, scale, softcap, CAPPED)
    return y


@triton.jit
def sum_tiles(
    p_row, p_bias, target, begin, end, vocab, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of exp(y - maximum) without the target) over the tiles begin .. end - 1, the last one first."""
    m_c = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    rest_c = tl.zeros((BLOCK_C,), tl.float32)
    offset_rc = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    target = target.to(tl.int32)
    for step in range(begin, end):
        col_rc = (end - 1 - (step - begin)) * (BLOCK_R * BLOCK_C) + offset_rc
        m_rc = col_rc < vocab
        y_rc, _ = logit(load_products(p_row, p_bias, col_rc, m_rc), scale, softcap, CAPPED)
        y_rc = tl.where(m_rc, y_rc, float("-inf"))
        new_c = tl.maximum(m_c, tl.max(y_rc, axis=0))
        base_c = finite_or_zero(new_c)
        e_rc = tl.where(col_rc == target, 0.0, tl.exp(y_rc - base_c[None, :]))
        rest_c = rest_c * tl.exp(m_c - base_c) + tl.sum(e_rc, axis=0)
        m_c = new_c
    m = tl.max(m_c, axis=0)
    return m, tl.sum(rest_c * tl.exp(m_c - finite_or_zero(m)), axis=0)


@triton.jit(do_not_specialize=["num_tiles"])
def row_logp_kernel(
    p_z, p_target, p_bias, p_logp, p_lse, p_d, stride_z, stride_d, vocab, num_tiles, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: log-prob, logsumexp and, where p_d is given, the gradient, possibly over the row's own memory.

    A 16-bit gradient may start where the float32 row starts. Its tile t takes the bytes of the products
    [t * LINE / 2, (t + 1) * LINE / 2): for t = 0 the first half of tile 0 itself, for t > 0 entries of tiles before t.
    Tiles go in ascending order and the barrier lies between the load and the store of each, so every thread has
    loaded tile t, and all tiles before, when any thread stores tile t: no product is lost before it is read.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + row)
    p_row = p_z + row * stride_z
    m, rest = sum_tiles(p_row, p_bias, target, 0, num_tiles, vocab, scale, softcap, CAPPED, BLOCK_R, BLOCK_C)
    logp, lse, total = finish(m, rest, load_target(p_row, p_bias, target, vocab, scale, softcap, CAPPED))
    tl.store(p_logp + row, logp)
    tl.store(p_lse + row, lse)
    if p_d is not None:
        base, inverse, rest = finite_or_zero(m), 1.0 / total, rest / total
        p_d_row, token = p_d + row * stride_d, target.to(tl.int32)
        # One line a tile here, so that the layout that suits the 16-bit store is not forced on the first pass; half
        # as long with softcap, which needs more registers an entry.
        LINE: tl.constexpr = BLOCK_R * BLOCK_C // 2 if CAPPED else BLOCK_R * BLOCK_C
        for tile in range(num_tiles * (BLOCK_R * BLOCK_C // LINE)):
            col_c = tile * LINE + tl.arange(0, LINE)
            m_c = col_c < vocab
            z_c = load_products(p_row, p_bias, col_c, m_c)
            tl.debug_barrier()
            y_c, slope_c = logit(z_c, scale, softcap, CAPPED)
            d_c = tl.where(col_c == token, rest, -tl.exp(y_c - base) * inverse) * slope_c
            tl.store(p_d_row + col_c, narrow(d_c, p_d.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "split_tiles"])
def row_partials_kernel(
    p_z, p_target, p_bias, p_m, p_rest, p_y, stride_z, num_rows, vocab, num_tiles, split_tiles, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One split of one row: maximum and sum into [S, N]; the first split writes the target's logit too."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(p_target + row)
    p_row = p_z + row * stride_z
    begin = split * split_tiles
    end = tl.minimum(begin + split_tiles, num_tiles)
    m, rest = sum_tiles(p_row, p_bias, target, begin, end, vocab, scale, softcap, CAPPED, BLOCK_R, BLOCK_C)
    at = split.to(tl.int64) * num_rows + row
    tl.store(p_m + at, m)
    tl.store(p_rest + at, rest)
    if split == 0:
        tl.store(p_y + row, load_target(p_row, p_bias, target, vocab, scale, softcap, CAPPED))


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def combine_kernel(p_m, p_rest, p_y, p_logp, p_lse, num_rows, num_parts, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Join partial sums [S, N] in a fixed order: log-prob and logsumexp [N]."""
    row_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = row_n < num_rows
    max_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    rest_n = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, num_parts, BLOCK_S):
        part_s = begin + tl.arange(0, BLOCK_S)
        m_sn = (part_s < num_parts)[:, None] & m_n[None, :]
        at_sn = part_s.to(tl.int64)[:, None] * num_rows + row_n[None, :]
        part_sn = tl.load(p_m + at_sn, mask=m_sn, other=float("-inf"))
        new_n = tl.maximum(max_n, tl.max(part_sn, axis=0))
        base_n = finite_or_zero(new_n)
        sum_sn = tl.load(p_rest + at_sn, mask=m_sn, other=0.0) * tl.exp(part_sn - base_n[None, :])
        rest_n = rest_n * tl.exp(max_n - base_n) + tl.sum(sum_sn, axis=0)
        max_n = new_n
    target_n = tl.load(p_y + row_n, mask=m_n, other=0.0)
    logp_n, lse_n, _ = finish(max_n, rest_n, target_n)
    tl.store(p_logp + row_n, logp_n, mask=m_n)
    tl.store(p_lse + row_n, lse_n, mask=m_n)


@triton.jit(do_not_specialize=["num_tiles", "split_tiles"])
def row_dlogits_kernel(
    p_z, p_target, p_bias, p_lse, p_d, stride_z, stride_d, vocab, num_tiles, split_tiles, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of one split of one row from its logsumexp, in one pass; in place as in `row_logp_kernel`.

    A 16-bit gradient in place needs the whole row in one program: another split could read what this one overwrites.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(p_target + row).to(tl.int32)
    lse = tl.load(p_lse + row)
    begin = split * split_tiles
    end = tl.minimum(begin + split_tiles, num_tiles)
    LINE: tl.constexpr = BLOCK_R * BLOCK_C // 2 if CAPPED else BLOCK_R * BLOCK_C
    for tile in range(begin * (BLOCK_R * BLOCK_C // LINE), end * (BLOCK_R * BLOCK_C // LINE)):
        col_c = tile * LINE + tl.arange(0, LINE)
        m_c = col_c < vocab
        z_c = load_products(p_z + row * stride_z, p_bias, col_c, m_c)
        tl.debug_barrier()
        y_c, slope_c = logit(z_c, scale, softcap, CAPPED)
        p_c = tl.exp(y_c - lse)
        d_c = tl.where(col_c == target, 1.0 - p_c, -p_c) * slope_c
        tl.store(p_d + row * stride_d + col_c, narrow(d_c, p_d.dtype.element_ty), mask=m_c)


def combine(m_sn: Tensor, rest_sn: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and logsumexp [N] from partial maxima and sums [S, N] and target logits [N], all float32 contiguous."""
    (num_parts, num_rows), logp_n, lse_n = m_sn.shape, torch.empty_like(y_n), torch.empty_like(y_n)
    combine_kernel[(triton.cdiv(num_rows, COMBINE_ROWS),)](
        m_sn, rest_sn, y_n, logp_n, lse_n, num_rows, num_parts, COMBINE_ROWS, COMBINE_PARTS, num_warps=4
    )
    return logp_n, lse_n


def join_parts(m_sn: Tensor, rest_sn: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum [N] of rows from those of their parts [S, N], float32, where no log-prob is wanted yet."""
    m_n = m_sn.amax(dim=0)
    shift_n = m_n.masked_fill(m_n == float("-inf"), 0.0)
    return m_n, torch.sum(rest_sn * (m_sn - shift_n).exp_(), dim=0)
