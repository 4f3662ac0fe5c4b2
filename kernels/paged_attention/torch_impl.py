"""paged_attention with torch: gather the tokens of every sequence, then one masked attention call; write_kv.

Legend: b sequences, l longest context rounded up to whole blocks, h heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from macpo.kernels.attention_weights import capped, softmax


def paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, context_lens: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, Hq, D] -> [B, Hq, D]; see `op.paged_attention`."""
    batch, num_heads, _ = q.shape
    block_tokens, num_kv_heads, head_dim = k_pool.shape[1:]
    num_blocks = -(-int(context_lens.max()) // block_tokens)
    token = torch.arange(num_blocks * block_tokens, device=q.device)
    mask_bl = token < context_lens[:, None]
    if window is not None:
        mask_bl &= token >= context_lens[:, None] - window
    slot_bl = (block_table[:, :num_blocks].long()[:, :, None] * block_tokens + token[:block_tokens]).flatten(1)
    # Slots past a context may hold anything, NaN too, which 0 * NaN would let through: its last token stands there.
    slot_bl = torch.where(mask_bl, slot_bl, slot_bl.gather(1, context_lens.long()[:, None] - 1))
    k_bhld, v_bhld = (
        pool.reshape(-1, num_kv_heads * head_dim)
        .index_select(0, slot_bl.flatten())
        .view(batch, -1, num_kv_heads, head_dim)
        .transpose(1, 2)
        for pool in (k_pool, v_pool)
    )
    q_bhgd = q.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)  # a kv head's queries as rows
    mask = mask_bl[:, None, None]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q_bhgd, k_bhld, v_bhld, attn_mask=mask, scale=scale).reshape(q.shape)
    scale = head_dim**-0.5 if scale is None else scale
    wide = [x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q_bhgd, k_bhld, v_bhld)]
    scores = capped(wide[0] @ wide[1].mT * scale, softcap).masked_fill(~mask, float("-inf"))
    weights = softmax(scores, None if sinks is None else sinks.view(num_kv_heads, -1, 1))
    return (weights @ wide[2]).to(q.dtype).reshape(q.shape)


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] to their slots; see `op.write_kv`."""
    if not slots.numel():
        return
    pools = [pool.view(-1, *pool.shape[2:]) for pool in (k_pool, v_pool)]
    if slots.device.type != "cpu" or bool((slots < 0).any()):
        # Padding rows repeat the first real row's write, or write what lies in slot 0 where there is no real row:
        # equal writes to one place need neither an order nor a look at the values from the host.
        real = slots >= 0
        first = real.int().argmax()
        target = torch.where(real[first], slots[first], 0)
        slots_ = torch.where(real, slots, target)
        k, v = (
            torch.where(real[:, None, None], x, torch.where(real[first], x[first], pool[0]))
            for x, pool in zip((k, v), pools, strict=True)
        )
    else:
        slots_ = slots
    for x, pool in zip((k, v), pools, strict=True):
        pool.index_copy_(0, slots_, x)
