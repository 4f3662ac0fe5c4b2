"""Error-bounded gradient filtering in Triton: gradient products that leave out tiles of d where all is below eps.

A tile is 128 rows x 128 tokens of d = d logp / d z. One kernel marks the tiles and adds up what would be lost; the
marks become, on the device and without waiting for it, a list of kept tiles for each block of the result; the product
walks that list in ascending order. What a row of d W loses is at most its skipped mass times the largest |W| of a row.
The idea is that of arXiv 2411.09009, section 4.3, which skips by the same test inside its backward.
Legend: n rows, h hidden size, v vocabulary, r row tiles, t vocabulary tiles; m, k, j rows, terms and columns of a
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from macpo.kernels.linear_logp.triton_math import TRITON_NAMES, dot, narrow
from macpo.kernels.triton_support import AotKernel

TILE = 128
BLOCK_J = 128
BLOCK_K = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
FLAG_WARPS, NUM_WARPS = 16, 8
NUM_STAGES = 6  # half of them fetch the list of tiles, so that three buffers are left for the operands


@triton.jit
def tile_flags_kernel(p_d, p_keep, p_mass, stride_d, num_rows, vocab, num_tiles, eps, TILE: tl.constexpr):
    """Whether a tile has an entry that is not below eps (NaN is not), and the sums of |d| a row that it else loses."""
    row_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    col_v = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_nv = (row_n < num_rows)[:, None] & (col_v < vocab)[None, :]
    d_nv = tl.load(p_d + row_n.to(tl.int64)[:, None] * stride_d + col_v[None, :], mask=m_nv, other=0.0).to(tl.float32)
    size_nv = tl.abs(d_nv)
    count = tl.sum(tl.sum(tl.where((size_nv < eps) | (m_nv == 0), 0, 1), axis=1), axis=0)
    tl.store(p_keep + tl.program_id(0) * num_tiles + tl.program_id(1), tl.where(count > 0, 1, 0).to(tl.uint8))
    mass_n = tl.where(count > 0, 0.0, tl.sum(size_nv, axis=1))
    tl.store(p_mass + tl.program_id(1).to(tl.int64) * num_rows + row_n, mass_n, mask=row_n < num_rows)


@triton.jit
def filtered_kernel(
    p_a,
    p_b,
    p_out,
    p_tiles,
    p_count,
    stride_am,
    stride_ak,
    stride_b,
    stride_out,
    num_rows,
    num_terms,
    width,
    num_tiles,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of out = a b, or out += a b, over its rows' kept tiles. Masks also keep out what lies beyond d."""
    block_m = tl.program_id(0)
    row_m = block_m * TILE + tl.arange(0, TILE)
    col_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_m, m_j = row_m < num_rows, col_j < width
    p_a_m = p_a + row_m.to(tl.int64)[:, None] * stride_am
    sum_mj = tl.zeros((TILE, BLOCK_J), tl.float32)
    for step in range(tl.load(p_count + block_m) * (TILE // BLOCK_K)):
        tile = tl.load(p_tiles + block_m * num_tiles + step // (TILE // BLOCK_K))
        k_k = tile * TILE + step % (TILE // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = k_k < num_terms
        k_k = k_k.to(tl.int64)
        a_mk = tl.load(p_a_m + k_k[None, :] * stride_ak, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_kj = tl.load(p_b + k_k[:, None] * stride_b + col_j[None, :], mask=m_k[:, None] & m_j[None, :], other=0.0)
        sum_mj = dot(a_mk, b_kj, sum_mj)
    p_out_mj = p_out + row_m.to(tl.int64)[:, None] * stride_out + col_j[None, :]
    m_mj = m_m[:, None] & m_j[None, :]
    if ADD:
        sum_mj += tl.load(p_out_mj, mask=m_mj, other=0.0)
    tl.store(p_out_mj, narrow(sum_mj, p_out.dtype.element_ty), mask=m_mj)


def tile_flags(d_nv: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Which tiles of 128 rows x 128 tokens are kept, and what each row loses by the others.

    Args:
        d_nv: [N, V] float32, bfloat16 or float16; columns contiguous, any row stride.
        eps: a tile is left out where every |d| in it is below eps; 0 keeps all.

    Returns:
        (keep [ceil(N / 128), ceil(V / 128)] bool, skipped mass [N] float32: sum of |d| over left-out tiles).

    Raises:
        ValueError: another dtype, or columns that are not contiguous.
    """
    _check_gradient(d_nv)
    num_rows, vocab = d_nv.shape
    shape = triton.cdiv(num_rows, TILE), triton.cdiv(vocab, TILE)
    keep_rt = torch.empty(shape, dtype=torch.uint8, device=d_nv.device)
    mass_tn = torch.empty(shape[1], num_rows, dtype=torch.float32, device=d_nv.device)
    if num_rows:
        tile_flags_kernel[shape](
            d_nv, keep_rt, mass_tn, d_nv.stride(0), num_rows, vocab, shape[1], eps, TILE, num_warps=FLAG_WARPS
        )
    return keep_rt.bool(), mass_tn.sum(dim=0)


def filtered_matmul(d_nv: Tensor, weight_vh: Tensor, keep_rt: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """d W over the kept tiles alone, accumulated in float32.

    Args:
        d_nv: [N, V] float32, bfloat16 or float16; columns contiguous, any row stride.
        weight_vh: [V, H], dtype of d; columns contiguous.
        keep_rt: of `tile_flags`.
        dtype: of the result; default that of d.

    Returns:
        [N, H].

    Raises:
        ValueError: dtypes or strides that do not fit.
    """
    _check_gradient(d_nv)
    out_nh = torch.empty(d_nv.shape[0], weight_vh.shape[1], dtype=dtype or d_nv.dtype, device=d_nv.device)
    _product(d_nv, weight_vh, out_nh, keep_rt, add=False)
    return out_nh


def filtered_add_(out_vh: Tensor, d_nv: Tensor, x_nh: Tensor, keep_rt: Tensor) -> None:
    """out += d' x over the kept tiles alone, accumulated in float32; out [V, H] float32, x [N, H] of d's dtype.

    Raises:
        ValueError: dtypes or strides that do not fit.
    """
    _check_gradient(d_nv)
    if out_vh.dtype != torch.float32 or out_vh.stride(1) != 1:
        raise ValueError(f"sums over chunks are float32 with contiguous columns, got {out_vh.dtype}")
    _product(d_nv.T, x_nh, out_vh, keep_rt.T, add=True)


def _product(a_mk: Tensor, b_kj: Tensor, out_mj: Tensor, keep: Tensor, *, add: bool) -> None:
    (num_rows, num_terms), width = a_mk.shape, b_kj.shape[1]
    if b_kj.dtype != a_mk.dtype or b_kj.stride(1) != 1:
        raise ValueError(f"need {a_mk.dtype} with contiguous columns, got {b_kj.dtype}, strides {b_kj.stride()}")
    if not out_mj.numel():
        return
    # Kept tiles first, in ascending order: a stable sort of the flags.
    tiles = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices.to(torch.int32).contiguous()
    filtered_kernel[(tiles.shape[0], triton.cdiv(width, BLOCK_J))](
        a_mk,
        b_kj,
        out_mj,
        tiles,
        keep.sum(dim=1, dtype=torch.int32),
        *a_mk.stride(),
        b_kj.stride(0),
        out_mj.stride(0),
        num_rows,
        num_terms,
        width,
        tiles.shape[1],
        add,
        TILE,
        BLOCK_J,
        BLOCK_K[a_mk.dtype],
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def _check_gradient(d_nv: Tensor) -> None:
    if d_nv.dtype not in TRITON_NAMES or d_nv.stride(1) != 1:
        raise ValueError(
            f"need float32, bfloat16 or float16 with contiguous columns, got {d_nv.dtype}, strides {d_nv.stride()}"
        )


def aot_kernels() -> list[AotKernel]:
    """Marking and the two products in every dtype: d W (a by rows, b by rows) and d' x (a by columns)."""
    kernels = []
    for dtype, name in TRITON_NAMES.items():
        integers = dict.fromkeys(("num_rows", "vocab", "num_tiles"), "i32")
        kernels.append(
            AotKernel(
                f"linear_logp_tile_flags/{name}",
                tile_flags_kernel,
                {"p_d": f"*{name}", "p_keep": "*u8", "p_mass": "*fp32", "stride_d": "i64", **integers, "eps": "fp32"},
                {"TILE": TILE},
                FLAG_WARPS,
                aligned=("p_d", "p_keep", "p_mass", "stride_d"),
            )
        )
        for out, add in [(name, False), ("fp32", True)] + [("fp32", False)] * (name != "fp32"):
            unit, stride = ("stride_am", "stride_ak") if add else ("stride_ak", "stride_am")
            signature = {
                **{"p_a": f"*{name}", "p_b": f"*{name}", "p_out": f"*{out}", "p_tiles": "*i32", "p_count": "*i32"},
                **dict.fromkeys((stride, "stride_b", "stride_out"), "i64"),
                **dict.fromkeys(("num_rows", "num_terms", "width", "num_tiles"), "i32"),
            }
            aligned = ("p_a", "p_b", "p_out", "p_tiles", "p_count", stride, "stride_b", "stride_out", "width")
            blocks = {"TILE": TILE, "BLOCK_J": BLOCK_J, "BLOCK_K": BLOCK_K[dtype]}
            kernels.append(
                AotKernel(
                    f"linear_logp_filtered/{name}/{out}" + "/add" * add,
                    filtered_kernel,
                    signature,
                    {unit: 1, "ADD": add, **blocks},
                    NUM_WARPS,
                    NUM_STAGES,
                    aligned=(*aligned, "num_rows" if add else "num_terms"),
                    wgmma=name != "fp32",
                )
            )
    return kernels
