"""The Triton kernels of prefix_attention: forward, and the two of the backward.

The algorithm is FlashAttention-2 (arXiv 2307.08691, Algorithms 1 and 2) over lists of blocks: `plan.block_lists` says
which blocks a program visits, those without a mask first. Each program owns what it writes, so that nothing is
accumulated between programs and two runs give the same bits.

    p = exp2(s - lse),  s = log2(e) * scale * q k'
    dv = p' do,  dp = do v',  ds = p (dp - rowsum(do * o)),  dq = scale * ds k,  dk = scale * ds' q

A softcap c makes s = log2(e) * c * tanh(scale * q k' / c), and ds has the factor 1 - tanh^2. A sink begins the sum of
every row of its head, and so is in o and lse, from which the backward follows without another look at it. Without
them `cap_log2` and `p_sinks` are None, and what they need is not compiled.

Legend: m query block, n key block, d head size. Tensors are contiguous [T, H, D], so that all of a kind share their
offsets, for which registers are short: `stride_q` = Hq * D, `stride_k` = Hkv * D. `p_` pointers, `m_` masks. Pointers
move by whole blocks in int64; offsets inside a block are small. What changes from batch to batch is not specialised,
so that no batch waits for a compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from macpo.kernels.linear_logp.triton_math import cap

# plan.NUM_FULL, NUM_ALL, FIRST
_FULL = tl.constexpr(0)
_ALL = tl.constexpr(1)
_FIRST = tl.constexpr(2)
# A masked score: finite, so that a row which has seen nothing yet needs no care; what it gathered is scaled by 0 later.
_HIDDEN = tl.constexpr(-1.0e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a b + c, float32. "emulate" is bf16 in the interpreter, whose product does not know it; float32's is the same."""
    if PRECISION == "emulate":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _narrow(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 x rounded to nearest even; the interpreter cuts bits off instead, so there it is spelled out."""
    if PRECISION == "emulate":
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(p_head, start, stride_t, num_tokens, head_dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
          PADDED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """[BLOCK, BLOCK_D] of one head from token `start` on; 0 beyond the last token (MASKED) and head size (PADDED)."""
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    p = p_head + start.to(tl.int64) * stride_t + (row[:, None] * stride_t + d[None, :])
    if MASKED:
        m_row = (start + row)[:, None] < num_tokens
        if PADDED:
            return tl.load(p, mask=m_row & (d[None, :] < head_dim), other=0.0)
        return tl.load(p, mask=m_row, other=0.0)
    if PADDED:
        return tl.load(p, mask=d[None, :] < head_dim, other=0.0)
    return tl.load(p)


@triton.jit
def _store(p_head, start, stride_t, num_tokens, head_dim, value, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """The inverse of `_tile`."""
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    p = p_head + start.to(tl.int64) * stride_t + (row[:, None] * stride_t + d[None, :])
    mask = ((start + row)[:, None] < num_tokens) & (d[None, :] < head_dim)
    tl.store(p, _narrow(value, p_head.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def _bounds(p_visible, token, num_tokens):
    """prefix_lo, prefix_hi and own_lo of the tokens; those beyond the last see nothing."""
    m_token = token < num_tokens
    lo = tl.load(p_visible + token, mask=m_token, other=0)
    hi = tl.load(p_visible + num_tokens + token, mask=m_token, other=0)
    own = tl.load(p_visible + 2 * num_tokens + token, mask=m_token, other=2147483647)
    return lo, hi, own


@triton.jit
def _forward_blocks(acc, total, peak, q, p_k, p_v, p_list, begin, end, lo, hi, own, token,
                    stride_k, num_tokens, head_dim, scale_log2, cap_log2,
                    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over the key blocks `begin` .. `end - 1` of the list."""
    for at in range(begin, end):
        start = tl.load(p_list + at) * BLOCK_K
        k = _tile(p_k, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, MASKED)
        s = _dot(q, tl.trans(k), None, PRECISION)
        if cap_log2 is not None:
            tanh, _ = cap(s * (scale_log2 / cap_log2))
            s, unit = tanh * cap_log2, 1.0
        else:
            unit = scale_log2
        if MASKED:
            key = start + tl.arange(0, BLOCK_K)
            seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            seen = seen | ((key[None, :] >= own[:, None]) & (key[None, :] <= token[:, None]))
            s = tl.where(seen, s * unit, _HIDDEN)
            new_peak = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - new_peak[:, None])
        else:  # scale >= 0, so the largest product has the largest score
            new_peak = tl.maximum(peak, tl.max(s, 1) * unit)
            p = tl.exp2(s * unit - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _tile(p_v, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, MASKED)
        acc = _dot(_narrow(p, v.dtype, PRECISION), v, acc, PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_tokens", "group", "list_width"])
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_visible, p_lists, p_sinks,
    stride_q, stride_k, num_tokens, head_dim, group, list_width, scale_log2, cap_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o [T, Hq, D] and lse [Hq, T] (base 2) of one query block and head."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # late tokens of a long prompt have most to do: start them first
    start = block * BLOCK_Q
    token = start + tl.arange(0, BLOCK_Q)
    lo, hi, own = _bounds(p_visible, token, num_tokens)
    p_list = p_lists + block.to(tl.int64) * list_width
    num_full = tl.load(p_list + _FULL)
    num_all = tl.load(p_list + _ALL)
    p_k += head // group * head_dim
    p_v += head // group * head_dim
    q = _tile(p_q + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, True)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if p_sinks is not None:
        total = tl.full([BLOCK_Q], 1.0, tl.float32)
        peak = tl.zeros([BLOCK_Q], tl.float32) + tl.load(p_sinks + head) * _LOG2_E
    else:
        total = tl.zeros([BLOCK_Q], tl.float32)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, total, peak = _forward_blocks(
        acc, total, peak, q, p_k, p_v, p_list + _FIRST, 0, num_full, lo, hi, own, token,
        stride_k, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_K, BLOCK_D, PADDED, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = _forward_blocks(
        acc, total, peak, q, p_k, p_v, p_list + _FIRST, num_full, num_all, lo, hi, own, token,
        stride_k, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_K, BLOCK_D, PADDED, True, PRECISION,
    )  # fmt: skip
    tl.store(p_lse + head * num_tokens + token, peak + tl.log2(total), mask=token < num_tokens)
    out = acc / total[:, None]
    _store(p_o + head * head_dim, start, stride_q, num_tokens, head_dim, out, BLOCK_Q, BLOCK_D, PRECISION)


@triton.jit
def _dq_blocks(dq, q, do, lse, delta, p_k, p_v, p_list, begin, end, lo, hi, own, token,
               stride_k, num_tokens, head_dim, scale_log2, cap_log2,
               BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    for at in range(begin, end):
        start = tl.load(p_list + at) * BLOCK_K
        k = _tile(p_k, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, MASKED)
        v = _tile(p_v, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, MASKED)
        s = _dot(q, tl.trans(k), None, PRECISION)
        if cap_log2 is not None:
            tanh, slope = cap(s * (scale_log2 / cap_log2))
            s = tanh * cap_log2 - lse[:, None]
        else:
            s = s * scale_log2 - lse[:, None]
        if MASKED:
            key = start + tl.arange(0, BLOCK_K)
            seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            seen = seen | ((key[None, :] >= own[:, None]) & (key[None, :] <= token[:, None]))
            s = tl.where(seen, s, _HIDDEN)
        p = tl.exp2(s)
        dp = _dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if cap_log2 is not None:
            ds = ds * slope
        dq = _dot(_narrow(ds, k.dtype, PRECISION), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_tokens", "group", "list_width"])
def dq_kernel(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq, p_visible, p_lists,
    stride_q, stride_k, num_tokens, head_dim, group, list_width, scale, scale_log2, cap_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, Hq, D] of one query block and head, and delta [Hq, T] = rowsum(do * o) for `dkv_kernel`."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    start = block * BLOCK_Q
    token = start + tl.arange(0, BLOCK_Q)
    m_token = token < num_tokens
    do = _tile(p_do + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, True)
    o = _tile(p_o + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(p_delta + head * num_tokens + token, delta, mask=m_token)
    lse = tl.load(p_lse + head * num_tokens + token, mask=m_token, other=0.0)
    lo, hi, own = _bounds(p_visible, token, num_tokens)
    p_list = p_lists + block.to(tl.int64) * list_width
    num_full = tl.load(p_list + _FULL)
    num_all = tl.load(p_list + _ALL)
    p_k += head // group * head_dim
    p_v += head // group * head_dim
    q = _tile(p_q + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, True)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = _dq_blocks(
        dq, q, do, lse, delta, p_k, p_v, p_list + _FIRST, 0, num_full, lo, hi, own, token,
        stride_k, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_K, BLOCK_D, PADDED, False, PRECISION,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, p_k, p_v, p_list + _FIRST, num_full, num_all, lo, hi, own, token,
        stride_k, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_K, BLOCK_D, PADDED, True, PRECISION,
    )  # fmt: skip
    _store(p_dq + head * head_dim, start, stride_q, num_tokens, head_dim, dq * scale, BLOCK_Q, BLOCK_D, PRECISION)


@triton.jit
def _dkv_blocks(dk, dv, k, v, p_q, p_do, p_lse, p_delta, p_visible, p_list, num, first_head, group, key,
                stride_q, num_tokens, head_dim, scale_log2, cap_log2,
                BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
                DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The first `num` query blocks of the list, head after head in one loop: lists are short, heads are many.

    Scores are transposed, [n, m], so that both products with a float32 result take them as they are.
    """
    for at in range(0, num * group):
        head = first_head + at // num
        start = tl.load(p_list + at % num) * BLOCK_Q
        token = start + tl.arange(0, BLOCK_Q)
        q = _tile(p_q + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, MASKED)
        do = _tile(p_do + head * head_dim, start, stride_q, num_tokens, head_dim, BLOCK_Q, BLOCK_D, PADDED, MASKED)
        s = _dot(k, tl.trans(q), None, PRECISION)
        if cap_log2 is not None:
            tanh, slope = cap(s * (scale_log2 / cap_log2))
            s, unit = tanh * cap_log2, 1.0
        else:
            unit = scale_log2
        if MASKED:  # the order of loads keeps few of them in registers
            lo, hi, own = _bounds(p_visible, token, num_tokens)
            seen = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
            seen = seen | ((key[:, None] >= own[None, :]) & (key[:, None] <= token[None, :]))
            lse = tl.load(p_lse + head * num_tokens + token, mask=token < num_tokens, other=0.0)
            p = tl.exp2(tl.where(seen, s * unit - lse[None, :], _HIDDEN))
            if DK:
                delta = tl.load(p_delta + head * num_tokens + token, mask=token < num_tokens, other=0.0)
        else:
            p = tl.exp2(s * unit - tl.load(p_lse + head * num_tokens + token)[None, :])
            if DK:
                delta = tl.load(p_delta + head * num_tokens + token)
        if DV:
            dv = _dot(_narrow(p, do.dtype, PRECISION), do, dv, PRECISION)
        if DK:
            minus_delta = tl.broadcast_to(-delta[None, :], p.shape)  # where the sum starts: saves registers
            ds = p * _dot(v, tl.trans(do), minus_delta, PRECISION)
            if cap_log2 is not None:
                ds = ds * slope
            dk = _dot(_narrow(ds, q.dtype, PRECISION), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_tokens", "group", "list_width"])
def dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_visible, p_lists,
    stride_q, stride_k, num_tokens, head_dim, group, list_width, scale, scale_log2, cap_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv [T, Hkv, D] of one key block and key/value head, summed over its query heads in order.

    Both accumulators of a head of 256 do not fit the registers: there DK and DV are two launches.
    """
    kv_head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)  # the first keys of a long prompt are seen by most: they start first
    start = block * BLOCK_K
    key = start + tl.arange(0, BLOCK_K)
    k = _tile(p_k + kv_head * head_dim, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, True)
    v = _tile(p_v + kv_head * head_dim, start, stride_k, num_tokens, head_dim, BLOCK_K, BLOCK_D, PADDED, True)
    p_list = p_lists + block.to(tl.int64) * list_width
    num_full = tl.load(p_list + _FULL)
    num_all = tl.load(p_list + _ALL)
    dk = tl.zeros([BLOCK_K if DK else 1, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K if DV else 1, BLOCK_D], tl.float32)
    dk, dv = _dkv_blocks(
        dk, dv, k, v, p_q, p_do, p_lse, p_delta, p_visible, p_list + _FIRST, num_full, kv_head * group, group, key,
        stride_q, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_Q, BLOCK_D, PADDED, False, DK, DV, PRECISION,
    )  # fmt: skip
    dk, dv = _dkv_blocks(
        dk, dv, k, v, p_q, p_do, p_lse, p_delta, p_visible, p_list + _FIRST + num_full, num_all - num_full,
        kv_head * group, group, key,
        stride_q, num_tokens, head_dim, scale_log2, cap_log2, BLOCK_Q, BLOCK_D, PADDED, True, DK, DV, PRECISION,
    )  # fmt: skip
    if DK:
        dk *= scale
        _store(p_dk + kv_head * head_dim, start, stride_k, num_tokens, head_dim, dk, BLOCK_K, BLOCK_D, PRECISION)
    if DV:
        _store(p_dv + kv_head * head_dim, start, stride_k, num_tokens, head_dim, dv, BLOCK_K, BLOCK_D, PRECISION)
