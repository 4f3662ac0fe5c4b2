"""paged_attention: one decode step over a block table; write_kv: the step's keys and values into the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.attention_weights import checked_sinks
from macpo.kernels.backend import explain
from macpo.kernels.paged_attention import library


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of one query token a sequence over its own context; inference only.

    Token t of sequence b lives at `pool[block_table[b, t // block_tokens], t % block_tokens]`.

    Args:
        q: [B, Hq, D] float.
        k_pool, v_pool: [num_blocks, block_tokens, Hkv, D], dtype of q; Hq is a multiple of Hkv.
        block_table: [B, max_blocks] int32; entries past a context are not read and may be -1.
        context_lens: [B] int32, tokens of each context, the current one included (>= 1). Checked on CPUs only, not to
            wait for a device.
        scale: factor on the scores; default D ** -0.5.
        window: only the last `window` tokens of the context; None for all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
        sinks: [Hq] float, a logit of each query head that joins the softmax and has no value (gpt-oss); None for none.
        backend: force one; default by device (`macpo.kernels.backend`).

    Returns:
        [B, Hq, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together; on backend "triton" also head sizes other than
            64, 80, 96, 128, 256, block_tokens other than 16, 32, 64 and dtypes other than bf16, fp16, fp32.
        BackendError: the forced backend is not there.

    Source: PagedAttention, arXiv 2309.06180.
    """
    if q.dim() != 3 or k_pool.dim() != 4 or k_pool.shape != v_pool.shape:
        raise ValueError(
            "need q [B, Hq, D] and k_pool, v_pool [blocks, block_tokens, Hkv, D]; got "
            f"{list(q.shape)}, {list(k_pool.shape)}, {list(v_pool.shape)}"
        )
    if q.shape[2] != k_pool.shape[3] or q.shape[1] % k_pool.shape[2]:
        raise ValueError(f"D differs or Hq is no multiple of Hkv: {list(q.shape)}, {list(k_pool.shape)}")
    if not q.dtype == k_pool.dtype == v_pool.dtype:
        raise ValueError(f"q and the pools must have one dtype, got {q.dtype}, {k_pool.dtype}, {v_pool.dtype}")
    batch = q.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(f"block_table must be int32 [{batch}, max_blocks], got {list(block_table.shape)}")
    if context_lens.shape != (batch,) or context_lens.dtype != torch.int32:
        raise ValueError(f"context_lens must be int32 [{batch}], got {context_lens.dtype} {list(context_lens.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    sinks = checked_sinks(q, q.shape[1], softcap, sinks)
    run = torch.ops.macpo.paged_attention if torch.compiler.is_compiling() else library.run_paged_attention
    return run(q, k_pool, v_pool, block_table, context_lens, scale, window, softcap, sinks, backend)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str:
    """Say which of these the device's backend does not support; empty where it supports all."""
    if explain("paged_attention", device).backend != "triton":
        return ""
    from macpo.kernels.paged_attention import triton_impl

    pool = torch.empty(1, block_tokens, 1, head_dim, dtype=dtype, device="meta")
    return triton_impl.why_not(pool[0, :1], pool, pool)


def write_kv(
    k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, *, backend: str | None = None
) -> None:
    """Write tokens' keys and values into the pools, in place.

    Args:
        k, v: [T, Hkv, D], dtype of the pools.
        k_pool, v_pool: [num_blocks, block_tokens, Hkv, D], contiguous.
        slots: [T] int64: block * block_tokens + offset of each token, or -1 for a padding row, which is not written.
            The others are all different. Slots past the pool raise on CPUs and are not checked on a device.
        backend: force one; default by device (`macpo.kernels.backend`).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        IndexError: (CPU only) a slot past the pool or below -1.
        BackendError: the forced backend is not there.
    """
    if k.shape != v.shape or k.shape[1:] != k_pool.shape[2:] or k_pool.shape != v_pool.shape:
        raise ValueError(f"k, v and the pools do not fit: {list(k.shape)}, {list(v.shape)}, {list(k_pool.shape)}")
    if not k.dtype == v.dtype == k_pool.dtype == v_pool.dtype:
        raise ValueError(f"k, v and the pools must have one dtype, got {k.dtype}, {v.dtype}, {k_pool.dtype}")
    if slots.dtype != torch.int64 or slots.shape != k.shape[:1]:
        raise ValueError(f"slots must be int64 [{k.shape[0]}], got {slots.dtype} {list(slots.shape)}")
    if not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError("the pools must be contiguous")
    run = torch.ops.macpo.write_kv if torch.compiler.is_compiling() else library.run_write_kv
    run(k, v, k_pool, v_pool, slots, backend)
