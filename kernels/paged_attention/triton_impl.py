"""paged_attention and write_kv in Triton: split-KV decode with the query heads of a kv head packed as rows of a tile.

Legend: b sequences, h query heads, g query heads of a kv head, t tokens, d head size, s splits.

Every launch depends on shapes and dtypes alone (no host synchronisation), so a step can be captured in a CUDA graph.
Splits are counted from shapes and cut each sequence's own visible tokens evenly; float32 partials are combined in
split order, so results repeat to the bit. Source: Flash-Decoding (split-KV, Dao et al. 2023), PagedAttention,
arXiv 2309.06180.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.attention_weights import is_rare
from macpo.kernels.linear_logp.triton_math import cap, dot, narrow
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_TOKENS = (16, 32, 64)  # block sizes of the pools
BLOCK_M = 16  # rows of a query tile: the smallest that tensor cores take; heads beyond 16 are further tiles
NUM_SMS = 132  # a constant, so that the split count does not depend on the card
PROGRAMS_PER_SM = 4
MIN_SPLIT_TOKENS = 128  # a shorter split costs more in partials than it gains
MAX_SPLITS = 128
NO_WINDOW = 2**31 - 1
LOG2_E = tl.constexpr(1.4426950408889634)
WRITE_ELEMENTS = 1024  # of k (and of v) that a program of write_kv moves


class Config(NamedTuple):
    """The tile of keys and its launch options."""

    block_n: int
    num_warps: int
    num_stages: int


def config(head_dim: int, dtype: torch.dtype) -> Config:
    """Small tiles and several programs an SM keep the loads in flight; the stages hold two or three tiles of K and V.

    The block table, K and V are loaded through one another, so of the stages some are the table's. 16-bit heads of 128:
    the fastest of `bench.tune` on an H200; heads of 64 and 256 by the same bytes a tile, not measured.
    """
    if dtype == torch.float32:  # no tensor cores: eight warps share the products, so that nothing spills
        return Config(16 if head_dim > 128 else 32, 8, 5)
    return Config(32 if head_dim <= 64 else 16, 2, 6)


def num_splits(batch: int, num_heads: int, num_kv_heads: int, capacity: int) -> int:
    """Splits of a sequence: enough programs for every SM, none shorter than MIN_SPLIT_TOKENS of `capacity` tokens."""
    programs = batch * num_kv_heads * triton.cdiv(num_heads // num_kv_heads, BLOCK_M)
    wanted = triton.cdiv(PROGRAMS_PER_SM * NUM_SMS, programs)
    return max(1, min(wanted, triton.cdiv(capacity, MIN_SPLIT_TOKENS), MAX_SPLITS))


@triton.jit
def _span(p_context, b, num_splits, window, BLOCK_N: tl.constexpr):
    """First visible token of sequence b, its context, and the tokens of a split."""
    context = tl.load(p_context + b)
    first = tl.maximum(context - window, 0)
    chunk = tl.cdiv(tl.cdiv(context - first, num_splits), BLOCK_N) * BLOCK_N
    return first, context, tl.maximum(chunk, BLOCK_N)


@triton.jit(do_not_specialize=["stride_table", "num_splits", "window"])  # a longer block table compiles nothing
def decode_kernel(
    p_q, p_k, p_v, p_table, p_context, p_o, p_lse,
    stride_qb, stride_qh,
    stride_kp, stride_kt, stride_kh,
    stride_vp, stride_vt, stride_vh,
    stride_table,
    num_heads, num_kv_heads, num_tiles, num_splits, block_shift, window, scale_log2, p_sinks, cap_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A split of a sequence for up to 16 query heads of a kv head.

    Not SPLIT: o [B, Hq, D] of q's dtype. SPLIT: o [S, B, Hq, D] float32 and base-2 logsumexp lse [S, B, Hq], without
    sinks, which `combine_kernel` adds. Without a softcap or sinks cap_log2 or p_sinks is None.
    """
    b, split = tl.program_id(0), tl.program_id(2)
    kv_head, tile = tl.program_id(1) // num_tiles, tl.program_id(1) % num_tiles
    group = num_heads // num_kv_heads
    first, context, chunk = _span(p_context, b, num_splits, window, BLOCK_N)
    begin = first + split * chunk
    if begin >= context and SPLIT:
        return
    end = tl.minimum(begin + chunk, context)

    g = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m_g, m_d = g < group, d < HEAD_DIM
    head = kv_head * group + g
    q = tl.load(
        p_q + b.to(tl.int64) * stride_qb + head[:, None] * stride_qh + d[None, :],
        mask=m_g[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip

    p_row = p_table + b.to(tl.int64) * stride_table
    p_k_head, p_v_head = p_k + kv_head * stride_kh, p_v + kv_head * stride_vh
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if not SPLIT and p_sinks is not None:
        highest = tl.load(p_sinks + head, mask=m_g, other=0.0) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        m_t = t < end  # the table past the context may hold anything, and so may the slots
        block = tl.load(p_row + (t >> block_shift), mask=m_t, other=0).to(tl.int64)
        offset = t & ((1 << block_shift) - 1)
        m_kv = m_t[:, None] & m_d[None, :]
        k = tl.load(p_k_head + (block * stride_kp + offset * stride_kt)[:, None] + d[None, :], mask=m_kv, other=0.0)
        score = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
        if cap_log2 is not None:
            tanh, _ = cap(score / cap_log2)
            score = tanh * cap_log2
        score = tl.where(m_t[None, :], score, float("-inf"))
        risen = tl.maximum(highest, tl.max(score, 1))
        fade = tl.exp2(highest - risen)
        p = tl.exp2(score - risen[:, None])
        total = total * fade + tl.sum(p, 1)
        v = tl.load(p_v_head + (block * stride_vp + offset * stride_vt)[:, None] + d[None, :], mask=m_kv, other=0.0)
        acc = dot(narrow(p, v.dtype), v, acc * fade[:, None])
        highest = risen

    o = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    row = (split.to(tl.int64) * tl.num_programs(0) + b) * num_heads + head
    tl.store(
        p_o + row[:, None] * HEAD_DIM + d[None, :], narrow(o, p_o.dtype.element_ty), mask=m_g[:, None] & m_d[None, :]
    )
    if SPLIT:
        tl.store(p_lse + row, highest + tl.log2(total), mask=m_g)


@triton.jit(do_not_specialize=["num_splits", "window"])
def combine_kernel(
    p_partial, p_lse, p_context, p_o, num_heads, num_splits, window, p_sinks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Average of the splits of one (sequence, head), weighted by their softmax mass, in split order."""
    b, head = tl.program_id(0), tl.program_id(1)
    first, context, chunk = _span(p_context, b, num_splits, window, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_d = d < HEAD_DIM
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if p_sinks is not None:
        highest = tl.load(p_sinks + head) * LOG2_E
        total = total + 1.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split in range(0, tl.cdiv(context - first, chunk)):  # the splits that had tokens; the others wrote nothing
        row = (tl.num_programs(0).to(tl.int64) * split + b) * num_heads + head
        lse = tl.load(p_lse + row)
        risen = tl.maximum(highest, lse)
        fade, weight = tl.exp2(highest - risen), tl.exp2(lse - risen)
        acc = acc * fade + tl.load(p_partial + row * HEAD_DIM + d, mask=m_d, other=0.0) * weight
        total = total * fade + weight
        highest = risen
    o = tl.where(total > 0, acc / total, 0.0)
    row = b.to(tl.int64) * num_heads + head
    tl.store(p_o + row * HEAD_DIM + d, narrow(o, p_o.dtype.element_ty), mask=m_d)


@triton.jit
def write_kernel(
    p_k, p_v, p_k_pool, p_v_pool, p_slot,
    stride_kt, stride_kh, stride_vt, stride_vh,
    num_kv_heads, head_dim,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies the bits of one token's keys and values, BLOCK_H heads at a time; slot -1 is skipped."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slot + t)
    if slot < 0:
        return
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # a transposed k has strides of T * D
    d = tl.arange(0, BLOCK_D)
    mask = (h < num_kv_heads)[:, None] & (d < head_dim)[None, :]
    target = (slot * num_kv_heads + h)[:, None] * head_dim + d[None, :]
    k = tl.load(p_k + t * stride_kt + h[:, None] * stride_kh + d[None, :], mask=mask)
    v = tl.load(p_v + t * stride_vt + h[:, None] * stride_vh + d[None, :], mask=mask)
    tl.store(p_k_pool + target, k, mask=mask)
    tl.store(p_v_pool + target, v, mask=mask)


def why_not(q: Tensor, k_pool: Tensor, v_pool: Tensor) -> str:
    """Say which limit of these kernels the tensors exceed; empty where they fit."""
    block_tokens, head_dim = k_pool.shape[1], k_pool.shape[3]
    if q.dtype not in TRITON_NAMES:
        return f"dtype {q.dtype}; it takes bfloat16, float16 and float32"
    if head_dim not in HEAD_DIMS:
        return f"head size {head_dim}; it takes {', '.join(map(str, HEAD_DIMS))}"
    if block_tokens not in BLOCK_TOKENS:
        return f"block_tokens {block_tokens}; it takes {', '.join(map(str, BLOCK_TOKENS))}"
    if k_pool.stride(3) != 1 or v_pool.stride(3) != 1:
        return "pools whose head size is not the contiguous dimension"
    return ""


def paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, context_lens: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """q [B, Hq, D] -> [B, Hq, D]; see `op.paged_attention`. `splits` overrides the count, for tests.

    Raises:
        ValueError: a head size, block size or dtype that these kernels do not take.
    """
    if problem := why_not(q, k_pool, v_pool):
        raise ValueError(f"paged_attention: backend 'triton' does not take {problem}; backend='torch' does")
    batch, num_heads, head_dim = q.shape
    block_tokens, num_kv_heads = k_pool.shape[1:3]
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    context_lens = context_lens.contiguous()
    if splits is None:
        splits = num_splits(batch, num_heads, num_kv_heads, block_table.shape[1] * block_tokens)
    tiles = triton.cdiv(num_heads // num_kv_heads, BLOCK_M)
    chosen, block_d = config(head_dim, q.dtype), triton.next_power_of_2(head_dim)
    window = NO_WINDOW if window is None else window
    scale = head_dim**-0.5 if scale is None else scale
    cap_log2 = None if softcap is None else softcap * LOG2_E.value
    sinks = None if sinks is None else sinks.contiguous()

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial, lse = out, None
    if splits > 1:
        partial = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=q.device)
    decode_kernel[(batch, num_kv_heads * tiles, splits)](
        q, k_pool, v_pool, block_table, context_lens, partial, lse,
        q.stride(0), q.stride(1), *k_pool.stride()[:3], *v_pool.stride()[:3], block_table.stride(0),
        num_heads, num_kv_heads, tiles, splits, block_tokens.bit_length() - 1, window, scale * LOG2_E.value,
        None if splits > 1 else sinks, cap_log2,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=BLOCK_M, BLOCK_N=chosen.block_n, SPLIT=splits > 1,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch, num_heads)](
            partial, lse, context_lens, out, num_heads, splits, window, sinks,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=chosen.block_n, num_warps=1,
        )  # fmt: skip
    return out


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> None:
    """Writes k, v [T, Hkv, D] to their slots in one launch; see `op.write_kv`.

    Raises:
        ValueError: elements of more than 4 bytes, or heads of more than 256 elements.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if k.element_size() not in (2, 4) or head_dim > 256:
        raise ValueError(
            f"write_kv: backend 'triton' takes 2- and 4-byte elements and heads up to 256, got {k.dtype}, {head_dim}; "
            "backend='torch' takes these"
        )
    if not num_tokens:
        return
    as_bits = torch.int16 if k.element_size() == 2 else torch.int32  # one kernel for all types of a width
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    block_d = max(64, triton.next_power_of_2(head_dim))
    block_h = WRITE_ELEMENTS // block_d
    write_kernel[(num_tokens, triton.cdiv(num_kv_heads, block_h))](
        k.view(as_bits), v.view(as_bits), k_pool.view(as_bits), v_pool.view(as_bits), slots.contiguous(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), num_kv_heads, head_dim,
        BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def aot_kernels() -> list[AotKernel]:
    """Every kernel and configuration that the launchers above can choose."""
    kernels = []
    ints = ("num_heads", "num_kv_heads", "num_tiles", "num_splits", "block_shift", "window")
    strides = tuple(f"stride_{name}" for name in ("qb", "qh", "kp", "kt", "kh", "vp", "vt", "vh"))
    for dtype, name in TRITON_NAMES.items():
        for head_dim in HEAD_DIMS:
            block_n, num_warps, num_stages = config(head_dim, dtype)
            sizes = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
            for split, capped, sunk in product((False, True), repeat=3):
                if split and sunk:  # `combine_kernel` has them
                    continue
                pointers = {"p_q": name, "p_k": name, "p_v": name, "p_table": "i32", "p_context": "i32"}
                pointers |= {"p_o": "fp32", "p_lse": "fp32"} if split else {"p_o": name}
                signature = {key: f"*{value}" for key, value in pointers.items()}
                signature |= dict.fromkeys((*strides, "stride_table", *ints), "i32") | {"scale_log2": "fp32"}
                signature["stride_kp"] = signature["stride_vp"] = "i64"
                signature |= {"p_sinks": "*fp32", "cap_log2": "fp32"}
                absent = [
                    key for key, given in (("p_lse", split), ("p_sinks", sunk), ("cap_log2", capped)) if not given
                ]
                signature = {key: kind for key, kind in signature.items() if key not in absent}
                constexprs = sizes | {"BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "SPLIT": split} | dict.fromkeys(absent)
                variant = "/softcap" * capped + "/sinks" * sunk
                kernels.append(
                    AotKernel(
                        f"paged_attention_decode/d{head_dim}/{name}{'/split' * split}{variant}",
                        decode_kernel,
                        signature,
                        constexprs,
                        num_warps,
                        num_stages,
                        aligned=(*(key for key in signature if key.startswith("p_")), *strides),
                        max_spill_bytes=16,  # two registers, where ptxas stops at 64 or 168 of them
                        rare=is_rare(variant, head_dim, dtype),
                    )
                )
            for sinks in ({"p_sinks": "*fp32"}, {}):
                pointers = {"p_partial": "*fp32", "p_lse": "*fp32", "p_context": "*i32", "p_o": f"*{name}"} | sinks
                kernels.append(
                    AotKernel(
                        f"paged_attention_combine/d{head_dim}/{name}{'/sinks' if sinks else ''}",
                        combine_kernel,
                        pointers | dict.fromkeys(("num_heads", "num_splits", "window"), "i32"),
                        sizes | {"BLOCK_N": block_n} | ({} if sinks else {"p_sinks": None}),
                        num_warps=1,
                        aligned=tuple(pointers),
                        rare=is_rare("/sinks" if sinks else "", head_dim, dtype),
                    )
                )
    for bits in ("i16", "i32"):
        for block_d in (64, 128, 256):
            moved = ("p_k", "p_v", "p_k_pool", "p_v_pool")
            strides = ("stride_kt", "stride_kh", "stride_vt", "stride_vh")
            kernels.append(
                AotKernel(
                    f"write_kv/d{block_d}/{bits}",
                    write_kernel,
                    dict.fromkeys(moved, f"*{bits}")
                    | {"p_slot": "*i64"}
                    | dict.fromkeys((*strides, "num_kv_heads", "head_dim"), "i32"),
                    {"BLOCK_H": WRITE_ELEMENTS // block_d, "BLOCK_D": block_d},
                    aligned=(*moved, "p_slot", *strides, "head_dim"),
                )
            )
    return kernels
