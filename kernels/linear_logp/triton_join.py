# mypy: disable-error-code="no-untyped-def"
"""Kernels before and after the product of `triton_gemm`: bases of the rows, the join of their sums, and the repair.

Legend: n rows, h hidden size, v vocabulary, t vocabulary tiles; e = exp(y - base), rest its sum without the target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.linear_logp.triton_math import cap, dot, finish_above, finite_or_zero, load_block, narrow
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel

BASE_BLOCK = 1024
JOIN_ROWS, JOIN_PARTS = 32, 64
REPAIR_N, REPAIR_V, REPAIR_H = 16, 64, 64
REPAIR_SPLITS = 64  # parts of the vocabulary: one broken row keeps as many programs busy
# A sum of e above this, or none at all: the target is about 70 nats below the best token. Products of e with weights or
# hidden states of any size that models have are still far from the end of float32 then.
MOST = tl.constexpr(1e30)


@triton.jit
def base_kernel(
    p_hidden, p_weight, p_target, p_bias, p_base, stride_hidden, stride_weight, vocab, width, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The target's logit of one row; NaN where the target is no token."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + row)
    known = (target >= 0) & (target < vocab)
    own = tl.where(known, target, 0)
    z_h = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        h = start + tl.arange(0, BLOCK)
        x_h = tl.load(p_hidden + row * stride_hidden + h, mask=h < width, other=0.0).to(tl.float32)
        w_h = tl.load(p_weight + own * stride_weight + h, mask=h < width, other=0.0).to(tl.float32)
        z_h += x_h * w_h
    y = tl.sum(z_h, axis=0)
    if p_bias is not None:
        y += tl.load(p_bias + own)
    y *= scale
    if CAPPED:
        y = softcap * cap(y / softcap)[0]
    tl.store(p_base + row, tl.where(known, y, float("nan")))


@triton.jit
def _write(row_n, m_n, rest_n, y_n, base_n, p_target, p_logp, p_lse, p_factor, d, vocab, scale):
    """Log-prob, logsumexp and the gradient's factor of rows, and the target's entry of their gradient where d is."""
    logp_n, lse_n, total_n = finish_above(base_n, rest_n, y_n)
    tl.store(p_logp + row_n, logp_n, mask=m_n)
    tl.store(p_lse + row_n, tl.where(rest_n <= MOST, lse_n, float("nan")), mask=m_n)
    tl.store(p_factor + row_n, -scale / total_n, mask=m_n)
    if d is not None:
        target_n = tl.load(p_target + row_n, mask=m_n, other=-1)
        known_n = m_n & (target_n >= 0) & (target_n < vocab)
        tl.store(d + row_n.to(tl.int64) * vocab + target_n, narrow(-rest_n, d.dtype.element_ty), mask=known_n)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def join_kernel(
    p_rest, p_y, p_base, p_target, p_logp, p_lse, p_factor, d, num_rows, num_parts, vocab, scale,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Partial sums [T, N] added in a fixed order; see `_write`. A row that overflowed has NaN for its logsumexp."""
    row_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = row_n < num_rows
    rest_n = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, num_parts, BLOCK_T):
        part_t = begin + tl.arange(0, BLOCK_T)
        at_tn = part_t.to(tl.int64)[:, None] * num_rows + row_n[None, :]
        rest_n += tl.sum(tl.load(p_rest + at_tn, mask=(part_t < num_parts)[:, None] & m_n[None, :], other=0.0), axis=0)
    y_n, base_n = tl.load(p_y + row_n, mask=m_n, other=0.0), tl.load(p_base + row_n, mask=m_n, other=0.0)
    _write(row_n, m_n, rest_n, y_n, base_n, p_target, p_logp, p_lse, p_factor, d, vocab, scale)


@triton.jit
def _logits(
    p_hidden, p_weight, p_bias, start_n, start_v, num_rows, vocab, width, stride_hidden, stride_weight, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] logits, -inf beyond the vocabulary."""
    z_nv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start_h in range(0, width, BLOCK_H):
        h_nh = load_block(p_hidden, start_n, start_h, num_rows, width, stride_hidden, BLOCK_N, BLOCK_H, False)
        w_vh = load_block(p_weight, start_v, start_h, vocab, width, stride_weight, BLOCK_V, BLOCK_H, False)
        z_nv = dot(h_nh, w_vh.T, z_nv)
    col_v = start_v + tl.arange(0, BLOCK_V)
    if p_bias is not None:
        z_nv += tl.load(p_bias + col_v, mask=col_v < vocab, other=0.0)[None, :]
    y_nv = z_nv * scale
    if CAPPED:
        y_nv = softcap * cap(y_nv / softcap)[0]
    return tl.where((col_v < vocab)[None, :], y_nv, float("-inf"))


@triton.jit(do_not_specialize=["num_rows", "split_size"])
def repair_sums_kernel(
    p_hidden, p_weight, p_target, p_bias, p_lse, p_broken, p_m, p_rest, p_y, stride_hidden, stride_weight,
    num_rows, vocab, width, split_size, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of rows without a logsumexp: largest logit, sum and target's logit [S, N] of one part of the vocabulary."""
    start_n, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    row_n = start_n + tl.arange(0, BLOCK_N)
    lse_n = tl.load(p_lse + row_n, mask=row_n < num_rows, other=0.0)
    m_n = (row_n < num_rows) & (lse_n != lse_n)
    if split == 0:
        tl.store(p_broken + row_n, m_n.to(tl.int8), mask=row_n < num_rows)
    if tl.max(m_n.to(tl.int32), axis=0) == 0:
        return
    target_n = tl.load(p_target + row_n, mask=m_n, other=-1)
    known_n = (target_n >= 0) & (target_n < vocab)
    max_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    rest_n = tl.zeros((BLOCK_N,), tl.float32)
    own_n = tl.where(known_n, 0.0, float("nan"))
    for start_v in range(split * split_size, tl.minimum((split + 1) * split_size, vocab), BLOCK_V):
        y_nv = _logits(p_hidden, p_weight, p_bias, start_n, start_v, num_rows, vocab, width, stride_hidden,
                       stride_weight, scale, softcap, CAPPED, BLOCK_N, BLOCK_V, BLOCK_H)  # fmt: skip
        here_nv = target_n.to(tl.int32)[:, None] == (start_v + tl.arange(0, BLOCK_V))[None, :]
        own_n += tl.sum(tl.where(here_nv & known_n[:, None], y_nv, 0.0), axis=1)
        new_n = tl.maximum(max_n, tl.max(y_nv, axis=1))
        base_n = finite_or_zero(new_n)
        e_nv = tl.where(here_nv, 0.0, tl.exp(y_nv - base_n[:, None]))
        rest_n = rest_n * tl.exp(max_n - base_n) + tl.sum(e_nv, axis=1)
        max_n = new_n
    at_n = split.to(tl.int64) * num_rows + row_n
    tl.store(p_m + at_n, max_n, mask=m_n)
    tl.store(p_rest + at_n, rest_n, mask=m_n)
    tl.store(p_y + at_n, own_n, mask=m_n)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "split_size"])
def repair_kernel(
    p_hidden, p_weight, p_target, p_bias, p_broken, p_m, p_rest, p_y, p_logp, p_lse, p_factor, d,
    stride_hidden, stride_weight, num_rows, vocab, width, num_splits, split_size, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The broken rows anew, with their largest logit as the base; d of one part of the vocabulary where it is given."""
    start_n, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    row_n = start_n + tl.arange(0, BLOCK_N)
    m_n = tl.load(p_broken + row_n, mask=row_n < num_rows, other=0) != 0
    if tl.max(m_n.to(tl.int32), axis=0) == 0:
        return
    split_s = tl.arange(0, BLOCK_S)
    at_sn = split_s.to(tl.int64)[:, None] * num_rows + row_n[None, :]
    m_sn = (split_s < num_splits)[:, None] & m_n[None, :]
    max_sn = tl.load(p_m + at_sn, mask=m_sn, other=float("-inf"))
    max_n = tl.max(max_sn, axis=0)
    shrink_sn = tl.exp(max_sn - finite_or_zero(max_n)[None, :])
    rest_n = tl.sum(tl.load(p_rest + at_sn, mask=m_sn, other=0.0) * shrink_sn, axis=0)
    own_n = tl.sum(tl.load(p_y + at_sn, mask=m_sn, other=0.0), axis=0)
    if split == 0:
        _write(row_n, m_n, rest_n, own_n, max_n, p_target, p_logp, p_lse, p_factor, None, vocab, scale)
    if d is not None:
        target_n = tl.load(p_target + row_n, mask=m_n, other=-1).to(tl.int32)
        for start_v in range(split * split_size, tl.minimum((split + 1) * split_size, vocab), BLOCK_V):
            y_nv = _logits(p_hidden, p_weight, p_bias, start_n, start_v, num_rows, vocab, width, stride_hidden,
                           stride_weight, scale, softcap, CAPPED, BLOCK_N, BLOCK_V, BLOCK_H)  # fmt: skip
            col_v = start_v + tl.arange(0, BLOCK_V)
            d_nv = tl.where(target_n[:, None] == col_v[None, :], -rest_n[:, None], tl.exp(y_nv - max_n[:, None]))
            at_nv = row_n.to(tl.int64)[:, None] * vocab + col_v[None, :]
            tl.store(d + at_nv, narrow(d_nv, d.dtype.element_ty), mask=m_n[:, None] & (col_v < vocab)[None, :])


def bases(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The targets' logits [N] float32, by dot products; bias float32 or None."""
    (num_rows, width), device = hidden_nh.shape, hidden_nh.device
    base_n = torch.empty(num_rows, dtype=torch.float32, device=device)
    base_kernel[(num_rows,)](
        hidden_nh, weight_vh, target_n, bias_v, base_n, hidden_nh.stride(0), weight_vh.stride(0),
        weight_vh.shape[0], width, scale, softcap or 1.0, softcap is not None, BASE_BLOCK,
    )  # fmt: skip
    return base_n


def join(
    rest_tn: Tensor, y_n: Tensor, base_n: Tensor, target_n: Tensor, scale: float, d_nv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, factor) [N] from the tiles' sums [T, N], and the targets' entries of d [N, V] where it is given."""
    num_parts, num_rows = rest_tn.shape
    logp_n, lse_n, factor_n = (torch.empty_like(y_n) for _ in range(3))
    vocab = 0 if d_nv is None else d_nv.shape[1]
    join_kernel[(triton.cdiv(num_rows, JOIN_ROWS),)](
        rest_tn, y_n, base_n, target_n, logp_n, lse_n, factor_n, d_nv, num_rows, num_parts, vocab, scale,
        JOIN_ROWS, JOIN_PARTS,
    )  # fmt: skip
    return logp_n, lse_n, factor_n


def repair(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None,
    logp_n: Tensor, lse_n: Tensor, factor_n: Tensor, d_nv: Tensor | None,
) -> None:  # fmt: skip
    """Recompute, in place, the rows whose logsumexp is NaN: each part of the vocabulary by programs of its own."""
    (num_rows, width), vocab, device = hidden_nh.shape, weight_vh.shape[0], hidden_nh.device
    split_size = triton.cdiv(triton.cdiv(vocab, REPAIR_SPLITS), REPAIR_V) * REPAIR_V
    num_splits = triton.cdiv(vocab, split_size)
    broken_n = torch.empty(num_rows, dtype=torch.int8, device=device)
    partials = torch.empty(3, num_splits, num_rows, dtype=torch.float32, device=device).unbind()
    head, strides = (hidden_nh, weight_vh, target_n, bias_v), (hidden_nh.stride(0), weight_vh.stride(0))
    form, sizes = (scale, softcap or 1.0, softcap is not None), (REPAIR_N, REPAIR_V, REPAIR_H)
    num_blocks = triton.cdiv(num_rows, REPAIR_N)
    repair_sums_kernel[(num_blocks, num_splits)](
        *head, lse_n, broken_n, *partials, *strides, num_rows, vocab, width, split_size, *form, *sizes
    )
    repair_kernel[(num_blocks, 1 if d_nv is None else num_splits)](
        *head, broken_n, *partials, logp_n, lse_n, factor_n, d_nv, *strides, num_rows, vocab, width, num_splits,
        split_size, *form, *sizes, REPAIR_SPLITS,
    )  # fmt: skip


def aot_kernels() -> list[AotKernel]:
    """Every dtype, with and without a bias, a softcap and a gradient, as the launchers above choose."""
    strides = {"stride_hidden": "i64", "stride_weight": "i64"}
    found = [("p_logp", "*fp32"), ("p_lse", "*fp32"), ("p_factor", "*fp32")]
    numbers = {"vocab": "i32", "width": "i32", "scale": "fp32", "softcap": "fp32"}
    kernels = []
    for dtype, name in TRITON_NAMES.items():
        gradients = (None, f"*{name}") if dtype != torch.float16 else (None,)
        for d in gradients:
            signature = {"p_rest": "*fp32", "p_y": "*fp32", "p_base": "*fp32", "p_target": "*i64", **dict(found)}
            signature |= {"num_rows": "i32", "num_parts": "i32", "vocab": "i32", "scale": "fp32"}
            if dtype != torch.float16:
                kernels.append(_aot(f"join/{name}", join_kernel, signature, {"BLOCK_N": 32, "BLOCK_T": 64}, d))
        for with_bias, capped in ((False, False), (True, False), (False, True), (True, True)):
            tags = f"{name}" + "/bias" * with_bias + "/softcap" * capped
            inputs = {"p_hidden": f"*{name}", "p_weight": f"*{name}", "p_target": "*i64", **strides, **numbers}
            constexprs: dict[str, object] = {"CAPPED": capped}
            if with_bias:
                inputs["p_bias"] = "*fp32"
            else:
                constexprs["p_bias"] = None
            sizes = {"BLOCK": BASE_BLOCK}
            kernels.append(_aot(f"base/{tags}", base_kernel, inputs | {"p_base": "*fp32"}, constexprs | sizes))
            sizes = {"BLOCK_N": REPAIR_N, "BLOCK_V": REPAIR_V, "BLOCK_H": REPAIR_H}
            parts = {"p_broken": "*i8", **dict.fromkeys(("p_m", "p_rest", "p_y"), "*fp32")}
            inputs = inputs | parts | {"num_rows": "i32", "split_size": "i32"}
            sums = inputs | {"p_lse": "*fp32"}
            kernels.append(_aot(f"repair_sums/{tags}", repair_sums_kernel, sums, constexprs | sizes))
            inputs, sizes = inputs | dict(found) | {"num_splits": "i32"}, sizes | {"BLOCK_S": REPAIR_SPLITS}
            for d in gradients:
                if d is None or not capped:
                    kernels.append(_aot(f"repair/{tags}", repair_kernel, inputs, constexprs | sizes, d))
    return kernels


def _aot(
    name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, object], d: str | bool | None = False
) -> AotKernel:
    """`d` is the type of the gradient's pointer, None where there is none, False for a kernel that never has one."""
    if isinstance(d, str):
        signature, name = signature | {"d": d}, name + "/gradient"
    elif d is None:
        constexprs = constexprs | {"d": None}
    aligned = [key for key, kind in signature.items() if kind.startswith("*") or "stride" in key]
    spills = 16 if "repair" in name and "fp32" in name else 0
    return AotKernel(
        f"linear_logp_{name}", kernel, signature, constexprs, aligned=(*aligned, "vocab"), max_spill_bytes=spills
    )
