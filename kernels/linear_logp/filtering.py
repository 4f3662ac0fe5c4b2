"""Error-bounded gradient filtering: which blocks of the vocabulary a chunk's gradient GEMMs can do without.

Most of a trained model's softmax is tiny; the idea is that of arXiv 2411.09009, section 4.3. Here a block of columns is
left out where every row's |d| is below eps, and what is left out is added up and reported.
Legend: n rows, v vocabulary, h hidden size, k kept columns, t blocks of the vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK_COLUMNS = 128
# Copying the kept columns of d and rows of W costs as much as the GEMMs gain where more than this is kept.
WORTHWHILE = 0.75


class Filter(Protocol):
    """The gradient GEMMs of one chunk without what is negligible."""

    mass: Tensor
    """Scalar: largest sum of |d| that a row loses."""

    def product_(self, d_nv: Tensor, weight_vh: Tensor, out_nh: Tensor) -> None:
        """out = d W."""

    def add_(self, out_vh: Tensor, d_nv: Tensor, x_nh: Tensor) -> None:
        """out += d' x, in float32."""


def make_filter(d_nv: Tensor, eps: float, backend: str) -> Filter | None:
    """What to leave out of a chunk with this d; None where everything stays.

    On the CPU whole columns of the chunk go, on a GPU tiles of 128 rows and 128 columns, chosen there.
    """
    if backend == "triton":
        return _Tiles(d_nv, eps)
    columns, mass = kept_columns(d_nv, eps)
    return None if columns is None else _Columns(d_nv, columns, mass)


class _Columns:
    def __init__(self, d_nv: Tensor, columns: Tensor, mass: Tensor) -> None:
        self.columns, self.mass = columns, mass
        side_by_side = d_nv.stride(0) == 1  # whole rows of the [V, n] buffer, rather than a column at a time
        self.d_nk = d_nv.T.index_select(0, columns).T if side_by_side else d_nv.index_select(1, columns)

    def product_(self, d_nv: Tensor, weight_vh: Tensor, out_nh: Tensor) -> None:
        torch.mm(self.d_nk, weight_vh.index_select(0, self.columns), out=out_nh)

    def add_(self, out_vh: Tensor, d_nv: Tensor, x_nh: Tensor) -> None:
        dtype = out_vh.dtype
        out_vh.index_add_(0, self.columns, self.d_nk.T.to(dtype) @ x_nh.to(self.d_nk.dtype).to(dtype))


class _Tiles:
    def __init__(self, d_nv: Tensor, eps: float) -> None:
        from macpo.kernels.linear_logp import triton_filter

        self.kernels = triton_filter
        self.keep_rt, mass_n = triton_filter.tile_flags(d_nv, eps)
        self.mass = mass_n.amax()

    def product_(self, d_nv: Tensor, weight_vh: Tensor, out_nh: Tensor) -> None:
        out_nh.copy_(self.kernels.filtered_matmul(d_nv, weight_vh, self.keep_rt))

    def add_(self, out_vh: Tensor, d_nv: Tensor, x_nh: Tensor) -> None:
        self.kernels.filtered_add_(out_vh, d_nv, x_nh.to(d_nv.dtype), self.keep_rt)


def kept_columns(d_nv: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    """Indices of the kept columns, None for all; the largest sum of |d| that a row loses (float32 scalar).

    Waits for the device that d is on: for CPU tensors.
    """
    vocab = d_nv.shape[1]
    whole = vocab // BLOCK_COLUMNS * BLOCK_COLUMNS
    blocks = [d_nv[:, :whole].unflatten(1, (-1, BLOCK_COLUMNS))] if whole else []
    if whole < vocab:
        blocks.append(d_nv[:, whole:].unsqueeze(1))
    top_t = torch.cat([torch.linalg.vector_norm(x, torch.inf, dim=(0, 2)) for x in blocks])
    kept_t = ~(top_t < eps)  # a NaN is kept
    columns = kept_t.repeat_interleave(BLOCK_COLUMNS)[:vocab].nonzero().squeeze(1)
    if columns.numel() > WORTHWHILE * vocab:
        return None, d_nv.new_zeros((), dtype=torch.float32)
    sums_nt = torch.cat([torch.linalg.vector_norm(x, 1, dim=2, dtype=torch.float32) for x in blocks], dim=1)
    return columns, (sums_nt * ~kept_t).sum(dim=1).amax()
