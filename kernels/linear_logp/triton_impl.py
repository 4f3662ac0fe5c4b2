"""The row operators of the head in Triton: float32 products in, log-prob, logsumexp and gradient out.

One program a row where there are rows enough for every multiprocessor; with fewer, a row is split over several
programs whose partial sums a second kernel joins. How many is a function of the shape.
Legend: n rows, v vocabulary, s splits of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from macpo.kernels.linear_logp import triton_gemm, triton_join, triton_scale
from macpo.kernels.linear_logp.triton_rows import (
    COMBINE_PARTS,
    COMBINE_ROWS,
    combine,
    combine_kernel,
    join_parts,
    row_dlogits_kernel,
    row_logp_kernel,
    row_partials_kernel,
)
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel

# A tile of a row is BLOCK_R x BLOCK_C consecutive entries; a thread holds 4 columns of each of the BLOCK_R lines, so
# that its running maxima and sums need nothing of other threads until the end of the row.
BLOCK_R, BLOCK_C, NUM_WARPS = 2, 2048, 16
TILE = BLOCK_R * BLOCK_C
FEW_ROWS = 132  # multiprocessors of an H100 or H200; rows are split below it
PROGRAMS = 264  # as many programs as then share them: two on each
TILE_META = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": NUM_WARPS}


def row_logp(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and the row's logsumexp, from float32 products; z is left as it is.

    Args:
        z_nv: [N, V] float32, the product h W'; columns contiguous, any row stride.
        target_n: [N] int64; outside [0, V) the row's results are NaN.
        bias_v: [V], added to z, or None.
        scale, softcap: logits are softcap * tanh(scale * (z + bias) / softcap), without softcap scale * (z + bias).

    Returns:
        (logp [N] float32, never above 0; lse [N] float32, never below the row's largest logit).

    Raises:
        ValueError: z is not float32 with contiguous columns.
    """
    num_rows, vocab, bias_v = _check(z_nv, bias_v)
    if _splits(num_rows, vocab)[2] > 1:
        return combine(*_partials(z_nv, target_n, bias_v, scale, softcap))
    return _whole_rows(z_nv, target_n, bias_v, None, scale, softcap)


def row_partials(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum m, sum of exp(y - m) over all but the target, the target's logit), each [N] float32; as `row_logp`.

    Raises:
        ValueError: z is not float32 with contiguous columns.
    """
    num_rows, _, bias_v = _check(z_nv, bias_v)
    if num_rows == 0:
        none = torch.empty(0, dtype=torch.float32, device=z_nv.device)
        return none, none, none
    m_sn, rest_sn, y_n = _partials(z_nv, target_n, bias_v, scale, softcap)
    return *join_parts(m_sn, rest_sn), y_n


def row_logp_dlogits_(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`row_logp`, and d logp / d z = (onehot - softmax) * d logit / d z in `dtype`; z's memory is consumed.

    d overwrites z: float32 entry by entry, 16 bits over the front of each row (row stride twice that of z). Where rows
    are split over programs (fewer than 132 of them) a 16-bit d is a tensor of its own. With `out` d lies there.

    Returns:
        (logp [N], lse [N], d [N, V] of `dtype`).

    Raises:
        ValueError: z is not float32 with contiguous columns, or dtype is not float32, bfloat16 or float16.
    """
    num_rows, vocab, bias_v = _check(z_nv, bias_v)
    if _splits(num_rows, vocab)[2] > 1:
        logp_n, lse_n = row_logp(z_nv, target_n, bias_v, scale, softcap)
        return logp_n, lse_n, row_dlogits_(z_nv, target_n, lse_n, bias_v, scale, softcap, dtype, out)
    d_nv = _gradient_memory(z_nv, dtype, out, split=False)
    return *_whole_rows(z_nv, target_n, bias_v, d_nv, scale, softcap), d_nv


def row_dlogits_(
    z_nv: Tensor, target_n: Tensor, lse_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None,
    dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d logp / d z from the logsumexp of `row_logp`; memory as in `row_logp_dlogits_`.

    Raises:
        ValueError: z is not float32 with contiguous columns, or dtype is not float32, bfloat16 or float16.
    """
    num_rows, vocab, bias_v = _check(z_nv, bias_v)
    num_tiles, split_tiles, num_splits = _splits(num_rows, vocab)
    d_nv = _gradient_memory(z_nv, dtype, out, split=num_splits > 1)
    if num_rows:
        row_dlogits_kernel[(num_rows, num_splits)](
            z_nv, target_n.contiguous(), bias_v, lse_n.contiguous(), d_nv, z_nv.stride(0), d_nv.stride(0), vocab,
            num_tiles, split_tiles, scale, softcap or 1.0, softcap is not None, **TILE_META,
        )  # fmt: skip
    return d_nv


def _partials(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums [S, N] of the splits of at least one row, and the targets' logits [N]."""
    num_rows, vocab = z_nv.shape
    num_tiles, split_tiles, num_splits = _splits(num_rows, vocab)
    m_sn, rest_sn = (torch.empty(num_splits, num_rows, dtype=torch.float32, device=z_nv.device) for _ in range(2))
    y_n = torch.empty(num_rows, dtype=torch.float32, device=z_nv.device)
    row_partials_kernel[(num_rows, num_splits)](
        z_nv, target_n.contiguous(), bias_v, m_sn, rest_sn, y_n, z_nv.stride(0), num_rows, vocab, num_tiles,
        split_tiles, scale, softcap or 1.0, softcap is not None, **TILE_META,
    )  # fmt: skip
    return m_sn, rest_sn, y_n


def _whole_rows(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, d_nv: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and logsumexps [N], one program a row; the gradient is written to d where it is given."""
    num_rows, vocab = z_nv.shape
    logp_n, lse_n = (torch.empty(num_rows, dtype=torch.float32, device=z_nv.device) for _ in range(2))
    if num_rows:
        row_logp_kernel[(num_rows,)](
            z_nv, target_n.contiguous(), bias_v, logp_n, lse_n, d_nv, z_nv.stride(0),
            0 if d_nv is None else d_nv.stride(0), vocab, triton.cdiv(vocab, TILE), scale, softcap or 1.0,
            softcap is not None, **TILE_META,
        )  # fmt: skip
    return logp_n, lse_n


def _check(z_nv: Tensor, bias_v: Tensor | None) -> tuple[int, int, Tensor | None]:
    """(N, V, bias in float32), or ValueError."""
    if z_nv.dtype != torch.float32 or z_nv.stride(1) != 1:
        raise ValueError(f"need float32 products with contiguous columns, got {z_nv.dtype}, strides {z_nv.stride()}")
    num_rows, vocab = z_nv.shape
    return num_rows, vocab, None if bias_v is None else bias_v.to(torch.float32).contiguous()


def _splits(num_rows: int, vocab: int) -> tuple[int, int, int]:
    """(tiles of a row, tiles of a split, splits of a row): functions of the shape alone."""
    num_tiles = triton.cdiv(vocab, TILE)
    if num_rows == 0 or num_rows >= FEW_ROWS:
        return num_tiles, num_tiles, 1
    split_tiles = triton.cdiv(num_tiles, min(num_tiles, triton.cdiv(PROGRAMS, num_rows)))
    return num_tiles, split_tiles, triton.cdiv(num_tiles, split_tiles)


def _gradient_memory(z_nv: Tensor, dtype: torch.dtype, out: Tensor | None, *, split: bool) -> Tensor:
    """Return the memory for the gradient: `out`, z itself, the front of its rows, or memory of its own."""
    if dtype not in TRITON_NAMES:
        raise ValueError(f"gradients of logits are float32, bfloat16 or float16, not {dtype}")
    if out is not None:
        if out.dtype != dtype or out.shape != z_nv.shape or out.stride(1) != 1:
            raise ValueError(f"d is {dtype} {list(z_nv.shape)} with contiguous columns; its memory is not")
        return out
    if dtype == torch.float32:
        return z_nv
    return torch.empty(z_nv.shape, dtype=dtype, device=z_nv.device) if split else z_nv.view(dtype)[:, : z_nv.shape[1]]


def aot_kernels() -> list[AotKernel]:
    """Every row kernel in every configuration that the launchers choose."""
    numbers = {"vocab": "i32", "num_tiles": "i32", "scale": "fp32", "softcap": "fp32"}
    pointers = ("p_m", "p_rest", "p_y", "p_logp", "p_lse")
    kernels = [
        AotKernel(
            "linear_logp_combine",
            combine_kernel,
            {**dict.fromkeys(pointers, "*fp32"), "num_rows": "i32", "num_parts": "i32"},
            {"BLOCK_N": COMBINE_ROWS, "BLOCK_S": COMBINE_PARTS},
            aligned=pointers,
        )
    ]
    for with_bias in (False, True):
        for capped in (False, True):
            tags = "/bias" * with_bias + "/softcap" * capped
            meta: dict[str, object] = {"CAPPED": capped, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
            common = {"p_z": "*fp32", "p_target": "*i64", "stride_z": "i64", **numbers}
            if with_bias:
                common["p_bias"] = "*fp32"
            else:
                meta["p_bias"] = None
            partials = {**dict.fromkeys(("p_m", "p_rest", "p_y"), "*fp32"), "num_rows": "i32", "split_tiles": "i32"}
            kernels.append(_aot("partials" + tags, row_partials_kernel, {**common, **partials}, meta))
            results = {"p_logp": "*fp32", "p_lse": "*fp32", "stride_d": "i64"}
            kernels.append(_aot("row" + tags, row_logp_kernel, {**common, **results}, {**meta, "p_d": None}))
            for name in TRITON_NAMES.values():
                d = {"p_d": f"*{name}", "stride_d": "i64"}
                kernels.append(_aot(f"row_dlogits/{name}{tags}", row_logp_kernel, {**common, **results, **d}, meta))
                known = {"p_lse": "*fp32", "split_tiles": "i32", **d}
                kernels.append(_aot(f"dlogits/{name}{tags}", row_dlogits_kernel, {**common, **known}, meta))
    return kernels + triton_gemm.aot_kernels() + triton_join.aot_kernels() + triton_scale.aot_kernels()


def _aot(name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, object]) -> AotKernel:
    aligned = [argument for argument, kind in signature.items() if kind.startswith("*") or "stride" in argument]
    return AotKernel(f"linear_logp_{name}", kernel, signature, constexprs, NUM_WARPS, aligned=(*aligned, "vocab"))
