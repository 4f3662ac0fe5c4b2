"""paged_attention and write_kv as operators of torch: `torch.compile` and graph capture see one call each.

Eager calls go straight to the `run_` functions, which is cheaper; they check values where no wait for a device follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from macpo.kernels.backend import explain
from macpo.kernels.paged_attention import torch_impl


def run_paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, context_lens: Tensor, scale: float | None,
    window: int | None, softcap: float | None, sinks: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    """Run `op.paged_attention` after its checks of shapes."""
    if context_lens.device.type == "cpu" and context_lens.numel():
        low, high = (int(value) for value in context_lens.aminmax())
        capacity = block_table.shape[1] * k_pool.shape[1]
        if low < 1 or high > capacity:
            raise ValueError(f"context_lens must be in 1..{capacity} (the block table's tokens), got {low}..{high}")
    choice = explain("paged_attention", q.device, backend)
    if not q.shape[0]:
        return torch.empty_like(q)
    implementation = torch_impl.paged_attention
    if choice.backend == "triton":
        from macpo.kernels.paged_attention import triton_impl

        implementation = triton_impl.paged_attention
    return implementation(
        q, k_pool, v_pool, block_table, context_lens, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def run_write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, backend: str | None) -> None:
    """Run `op.write_kv` after its checks of shapes."""
    if slots.device.type == "cpu" and slots.numel():
        low, high = (int(value) for value in slots.aminmax())
        capacity = k_pool.shape[0] * k_pool.shape[1]
        if low < -1 or high >= capacity:
            raise IndexError(f"slots must be in -1..{capacity - 1}, got {low}..{high}")
    choice = explain("paged_attention", k.device, backend)
    if choice.backend == "triton":
        from macpo.kernels.paged_attention import triton_impl

        triton_impl.write_kv(k, v, k_pool, v_pool, slots)
    else:
        torch_impl.write_kv(k, v, k_pool, v_pool, slots)


@torch.library.custom_op("macpo::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, context_lens: Tensor, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    return run_paged_attention(q, k_pool, v_pool, block_table, context_lens, scale, window, softcap, sinks, backend)


@_paged_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("macpo::write_kv", mutates_args=("k_pool", "v_pool"))
def _write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, backend: str | None = None) -> None:
    run_write_kv(k, v, k_pool, v_pool, slots, backend)
