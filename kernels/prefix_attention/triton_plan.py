# mypy: disable-error-code="no-untyped-def"
"""The plan of a packed row (see `plan`, whose definition it equals entry for entry) in two kernels.

In torch it takes about a hundred launches, which on a GPU cost more time than the work.

Legend: t tokens, m query blocks, n key blocks; s the six bounds of a query block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.prefix_attention import plan
from macpo.kernels.triton_support import AotKernel

CHUNK = 128  # blocks that a program looks at together
NUM_WARPS = 4
_NUM_FULL, _NUM_ALL, _FIRST = tl.constexpr(plan.NUM_FULL), tl.constexpr(plan.NUM_ALL), tl.constexpr(plan.FIRST)
# Bounds of a query block; `above` and `below` are what a key block that every query sees whole must keep to.
_LO, _HI, _OWN, _LO_MAX, _HI_MIN, _OWN_MAX = (tl.constexpr(i) for i in range(6))
NUM_BOUNDS = 6
_FAR = tl.constexpr(2**31 - 1)  # beyond every key


@triton.jit
def _visible(p_start, p_end, p_own, token, num_tokens, window):
    """prefix_lo, prefix_hi, own_lo of tokens; those beyond the last see nothing. `window` is 0 without one."""
    m_token = token < num_tokens
    lo = tl.load(p_start + token, mask=m_token, other=0)
    end = tl.load(p_end + token, mask=m_token, other=0)
    own = tl.load(p_own + token, mask=m_token, other=0)
    hi = tl.minimum(end, token + 1)
    if window > 0:
        position = end - lo + token - own
        lo = tl.maximum(lo, lo + position - (window - 1))
        own = tl.maximum(own, token - (window - 1))
    empty = lo >= hi
    lo, hi = tl.where(empty, own, lo), tl.where(empty, token + 1, hi)
    return tl.where(m_token, lo, _FAR), tl.where(m_token, hi, 0), tl.where(m_token, own, _FAR)


@triton.jit
def _block_bounds(p_start, p_end, p_own, p_bounds, block, num_blocks, num_tokens, window, BLOCK: tl.constexpr):
    """Write the bounds [s, m] of one block of queries."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    lo, hi, own = _visible(p_start, p_end, p_own, token, num_tokens, window)
    first_own = tl.min(own, 0)
    below = lo < first_own  # a prefix inside the own range adds nothing
    p = p_bounds + block
    tl.store(p + _LO * num_blocks, tl.min(tl.where(below, lo, _FAR), 0))
    tl.store(p + _HI * num_blocks, tl.minimum(tl.max(tl.where(below, hi, 0), 0), first_own))
    tl.store(p + _OWN * num_blocks, first_own)
    tl.store(p + _LO_MAX * num_blocks, tl.max(lo, 0))
    tl.store(p + _HI_MIN * num_blocks, tl.min(hi, 0))
    tl.store(p + _OWN_MAX * num_blocks, tl.max(own, 0))


@triton.jit(do_not_specialize=["num_tokens", "window", "blocks_a", "blocks_b"])
def bounds_kernel(
    p_start, p_end, p_own, p_visible, p_bounds, num_tokens, window, blocks_a, blocks_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """What each token sees, int32 [3, T], and the bounds of the query blocks of both sizes, [s, m] one after the other.

    Program i has block i of both sizes; the tokens are written with the blocks of size A.
    """
    block = tl.program_id(0)
    if block < blocks_a:
        token = block * BLOCK_A + tl.arange(0, BLOCK_A)
        lo, hi, own = _visible(p_start, p_end, p_own, token, num_tokens, window)
        m_token = token < num_tokens
        tl.store(p_visible + token, lo, mask=m_token)
        tl.store(p_visible + num_tokens + token, hi, mask=m_token)
        tl.store(p_visible + 2 * num_tokens + token, own, mask=m_token)
        _block_bounds(p_start, p_end, p_own, p_bounds, block, blocks_a, num_tokens, window, BLOCK_A)
    if block < blocks_b:
        p_bounds += blocks_a * 6
        _block_bounds(p_start, p_end, p_own, p_bounds, block, blocks_b, num_tokens, window, BLOCK_B)


@triton.jit
def _kinds(p_bounds, query_block, key_block, m_block, num_query_blocks, num_tokens, BLOCK_Q: tl.constexpr,
           BLOCK_K: tl.constexpr):  # fmt: skip
    """0 every query of the block sees every key of the block, 1 some may, 2 none does; -1 where there is no block."""
    p = p_bounds + query_block
    lo = tl.load(p + _LO * num_query_blocks, mask=m_block, other=0)
    hi = tl.load(p + _HI * num_query_blocks, mask=m_block, other=0)
    own = tl.load(p + _OWN * num_query_blocks, mask=m_block, other=0)
    lo_max = tl.load(p + _LO_MAX * num_query_blocks, mask=m_block, other=0)
    hi_min = tl.load(p + _HI_MIN * num_query_blocks, mask=m_block, other=0)
    own_max = tl.load(p + _OWN_MAX * num_query_blocks, mask=m_block, other=0)
    first = query_block * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, num_tokens) - 1
    start = key_block * BLOCK_K
    stop = start + BLOCK_K
    some = (start < hi) & (stop > lo) | (start <= last) & (stop > own)
    whole = (start >= lo_max) & (stop <= hi_min) | (start >= own_max) & (stop - 1 <= first)
    return tl.where(m_block, 2 - some.to(tl.int32) - whole.to(tl.int32), -1)


@triton.jit
def _list(p_list, p_bounds, block, num_others, num_query_blocks, num_tokens, BLOCK_Q: tl.constexpr,
          BLOCK_K: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One row of a list: the counts, and the other kind's blocks in the order of their kinds, ascending in each."""
    found = 0
    for kind in tl.static_range(3):
        for begin in range(0, num_others, CHUNK):
            other = begin + tl.arange(0, CHUNK)
            m_other = other < num_others
            one = tl.zeros([CHUNK], tl.int32) + block
            if BY_KEY:
                kinds = _kinds(p_bounds, other, one, m_other, num_query_blocks, num_tokens, BLOCK_Q, BLOCK_K)
            else:
                kinds = _kinds(p_bounds, one, other, m_other, num_query_blocks, num_tokens, BLOCK_Q, BLOCK_K)
            here = (kinds == kind).to(tl.int32)
            tl.store(p_list + _FIRST + found + tl.cumsum(here, 0) - 1, other, mask=here != 0)
            found += tl.sum(here, 0)
        if kind == 0:
            tl.store(p_list + _NUM_FULL, found)
        elif kind == 1:
            tl.store(p_list + _NUM_ALL, found)


@triton.jit(do_not_specialize=["num_tokens", "blocks_a", "keys_a", "blocks_b", "keys_b"])
def lists_kernel(
    p_bounds, p_key_lists, p_query_lists, num_tokens, blocks_a, keys_a, blocks_b, keys_b,
    BLOCK_QA: tl.constexpr, BLOCK_KA: tl.constexpr, BLOCK_QB: tl.constexpr, BLOCK_KB: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The key blocks of one query block (size A), or the query blocks of one key block (size B)."""
    row = tl.program_id(0)
    if row < blocks_a:
        p_list = p_key_lists + row.to(tl.int64) * (_FIRST + keys_a)
        _list(p_list, p_bounds, row, keys_a, blocks_a, num_tokens, BLOCK_QA, BLOCK_KA, False, CHUNK)
    else:
        row -= blocks_a
        p_list = p_query_lists + row.to(tl.int64) * (_FIRST + blocks_b)
        p_bounds += blocks_a * 6
        _list(p_list, p_bounds, row, blocks_b, blocks_b, num_tokens, BLOCK_QB, BLOCK_KB, True, CHUNK)


def make(
    prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor, window: int | None,
    forward: tuple[int, int], dkv: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """visible_3t, key_lists and query_lists, as `plan.visible_keys` and `plan.block_lists` have them.

    Args:
        prefix_start, prefix_end, segment_start: int32 [T], contiguous.
        window: positions that a token sees of its own sequence; None for all.
        forward, dkv: (queries, keys) of a block, of the lists by query and of those by key.
    """
    num_tokens, device = prefix_start.numel(), prefix_start.device
    (blocks_a, keys_a), (blocks_b, keys_b) = ([-(-num_tokens // size) for size in sizes] for sizes in (forward, dkv))
    visible_3t, key_lists, query_lists, bounds = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in (
            (3, num_tokens),
            (blocks_a, plan.FIRST + keys_a),
            (keys_b, plan.FIRST + blocks_b),
            (NUM_BOUNDS * (blocks_a + blocks_b),),
        )
    )
    bounds_kernel[(max(blocks_a, blocks_b),)](
        prefix_start, prefix_end, segment_start, visible_3t, bounds, num_tokens, window or 0, blocks_a, blocks_b,
        forward[0], dkv[0], num_warps=NUM_WARPS,
    )  # fmt: skip
    lists_kernel[(blocks_a + keys_b,)](
        bounds, key_lists, query_lists, num_tokens, blocks_a, keys_a, blocks_b, keys_b, *forward, *dkv, CHUNK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return visible_3t, key_lists, query_lists


def aot_kernels(sizes: set[tuple[tuple[int, int], tuple[int, int]]]) -> list[AotKernel]:
    """Both kernels for the (forward, dkv) block sizes that the attention kernels use."""
    found = []
    for forward, dkv in sorted(sizes):
        name = "x".join(map(str, (*forward, *dkv)))
        inputs = dict.fromkeys(("p_start", "p_end", "p_own", "p_visible", "p_bounds"), "*i32")
        numbers = dict.fromkeys(("num_tokens", "window", "blocks_a", "blocks_b"), "i32")
        constants = {"BLOCK_A": forward[0], "BLOCK_B": dkv[0]}
        found.append(_aot(f"bounds/{name}", bounds_kernel, inputs | numbers, constants))
        inputs = dict.fromkeys(("p_bounds", "p_key_lists", "p_query_lists"), "*i32")
        numbers = dict.fromkeys(("num_tokens", "blocks_a", "keys_a", "blocks_b", "keys_b"), "i32")
        blocks = dict(zip(("BLOCK_QA", "BLOCK_KA", "BLOCK_QB", "BLOCK_KB"), (*forward, *dkv), strict=True))
        found.append(_aot(f"lists/{name}", lists_kernel, inputs | numbers, blocks | {"CHUNK": CHUNK}))
    return found


def _aot(name: str, kernel: object, signature: dict[str, str], constants: dict[str, int]) -> AotKernel:
    pointers = tuple(argument for argument in signature if argument.startswith("p_"))
    return AotKernel(f"prefix_attention_{name}", kernel, signature, constants, num_warps=NUM_WARPS, aligned=pointers)
