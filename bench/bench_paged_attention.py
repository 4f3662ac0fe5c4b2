"""One decode step's attention over a paged KV pool, beside every peer.

    python -m bench.bench_paged_attention [--shapes small|issue|gpu] [--only SUBSTRING] [--json-dir DIR]
    pytest bench/bench_paged_attention.py --benchmark-json=FILE

The floor is memory: every key and value of every context is read once. Contexts differ by up to a quarter around the
stated length, and blocks lie in random order. Two peers have no paging at all, so that its cost can be seen: SDPA
over contiguous keys, and `slot_attention`, which generation uses on CPUs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.measure import SHORT, Case, Peer, copy_ceiling, imported, needs_cuda
from bench.harness.options import Spec, bench_one, run_bench
from bench.harness.timing import Outputs, Run
from macpo.kernels import paged_attention
from macpo.kernels.paged_attention import reference
from macpo.kernels.paged_attention.slots import slot_attention

OURS, OURS_TORCH = "macpo paged_attention", "macpo, torch backend"
OURS_SLOTS = "macpo slot_attention (no paging)"
GATHER, CONTIGUOUS = "torch gather + SDPA", "contiguous SDPA (no paging)"
VARLEN, FLASH, FLASHINFER = "torch varlen_attn (paged)", "flash-attn (paged)", "flashinfer"
PEERS = (OURS, OURS_TORCH, OURS_SLOTS, GATHER, CONTIGUOUS, VARLEN, FLASH, FLASHINFER)


class Shape(NamedTuple):
    """Sequences, their stated length, and how their keys and values lie in the pool."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int

    def case_name(self, dtype: torch.dtype) -> str:
        heads = f"heads{self.heads}/{self.kv_heads} d{self.head_dim}"
        return f"B{self.batch} context{self.context} {heads} block{self.block_tokens} {SHORT[dtype]}"


SHAPES: dict[str, tuple[torch.dtype, list[Shape]]] = {
    "small": (torch.float32, [Shape(3, 21, 4, 2, 16, 16)]),
    "issue": (torch.float32, [Shape(*sizes, 8, 2, 64, 32) for sizes in ((16, 300), (64, 300), (16, 2048))]),
    "gpu": (
        torch.bfloat16,
        [Shape(batch, context, 32, 8, 128, 32) for context in (300, 4096) for batch in (32, 256, 512)],
    ),
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    dtype, found = SHAPES[shapes]
    return [Spec(shape.case_name(dtype), partial(make_case, shape, dtype, device)) for shape in found]


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Make the inputs and compute their float64 reference."""
    batch, context, heads, kv_heads, size, block_tokens = shape
    g = torch.Generator().manual_seed(3)
    lens = (context * (0.75 + 0.5 * torch.rand(batch, generator=g))).int().clamp(min=1)
    per_row = -(-int(lens.max()) // block_tokens)
    table = torch.randperm(batch * per_row, generator=g).int().view(batch, per_row)
    torch.manual_seed(3)
    pools = [torch.randn(batch * per_row, block_tokens, kv_heads, size, device=device).to(dtype) for _ in range(2)]
    q = torch.randn(batch, heads, size, device=device).to(dtype)
    lens, table = lens.to(device), table.to(device)
    inputs = (q, *pools, table, lens)
    rows = zip(q.double().split(1), table, lens.split(1), strict=True)
    expected = torch.cat([reference.paged_attention(q1, *_row_pools(pools, row), n1) for q1, row, n1 in rows])
    read = int(lens.sum()) * kv_heads * size * 2 * q.element_size()
    num_bytes = float(read + 2 * q.nbytes)
    peers = [
        Peer(OURS, lambda: lambda: {"out": paged_attention(*inputs)}),
        Peer(OURS_TORCH, lambda: lambda: {"out": paged_attention(*inputs, backend="torch")}),
        Peer(OURS_SLOTS, partial(build_slots, *inputs)),
        Peer(GATHER, partial(build_gather, *inputs)),
        Peer(CONTIGUOUS, partial(build_contiguous, *inputs)),
        Peer(VARLEN, partial(build_varlen, *inputs)),
        Peer(FLASH, partial(build_flash, *inputs)),
        Peer(FLASHINFER, partial(build_flashinfer, *inputs)),
    ]
    return Case(
        shape.case_name(dtype),
        shape._asdict(),
        dtype,
        device,
        peers,
        {"out": expected},
        num_bytes=num_bytes,
        graph=True,
        **copy_ceiling(num_bytes, 2**25, device),
    )


def _row_pools(pools: list[Tensor], blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's blocks in float64, and its block table into them."""
    k, v = (pool[blocks.long()].double() for pool in pools)
    return k, v, torch.arange(blocks.numel(), dtype=torch.int32, device=blocks.device)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """q [B, Hq, D], k and v [B, L, Hkv, D] -> [B, Hq, D]; positions past a length are masked."""
    mask = torch.arange(k.shape[1], device=q.device) < lens[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None], enable_gqa=True
    )
    return out[:, :, 0]


def build_gather(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    def run() -> Outputs:
        k, v = (pool[table.long()].flatten(1, 2) for pool in (k_pool, v_pool))
        return {"out": _attend(q, k, v, lens)}

    return run


def build_contiguous(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    k, v = (pool[table.long()].flatten(1, 2).contiguous() for pool in (k_pool, v_pool))
    return lambda: {"out": _attend(q, k, v, lens)}


def build_slots(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    """Each sequence's keys in one piece, the layout of generation on CPUs."""
    k, v = (pool[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for pool in (k_pool, v_pool))
    lens_64 = lens.long()
    return lambda: {"out": slot_attention(q, k, v, lens_64)}


def build_varlen(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    needs_cuda(q.device)
    varlen_attn = imported("torch.nn.attention.varlen", "varlen_attn", "this torch has no varlen_attn")
    cu_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    inputs = (q, k_pool, v_pool, cu_q, None, 1, table.shape[1] * k_pool.shape[1])
    return lambda: {"out": varlen_attn(*inputs, enable_gqa=True, seqused_k=lens, block_table=table)}


def build_flash(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    flash = imported("flash_attn", "flash_attn_with_kvcache", "flash-attn does not import")
    return lambda: {"out": flash(q[:, None], k_pool, v_pool, cache_seqlens=lens, block_table=table)[:, 0]}


def build_flashinfer(q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lens: Tensor) -> Run:
    wrapper_of = imported("flashinfer", "BatchDecodeWithPagedKVCacheWrapper", "flashinfer does not import")
    block_tokens, kv_heads, size = k_pool.shape[1:]
    used = (lens + block_tokens - 1) // block_tokens
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    real = torch.arange(table.shape[1], device=q.device) < used[:, None]
    last = (lens - (used - 1) * block_tokens).int()
    workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = wrapper_of(workspace, "NHD")
    sizes = (q.shape[1], kv_heads, size, block_tokens)
    wrapper.plan(indptr, table[real], last, *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: {"out": wrapper.run(q, (k_pool, v_pool))}


test_paged_attention = bench_one

if __name__ == "__main__":
    run_bench("paged_attention", specs, __doc__ or "")
