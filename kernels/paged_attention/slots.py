"""slot_attention: one decode step over keys and values that lie contiguously, a slot a sequence.

Legend: b sequences, s slots (>= b), h query heads, k key-value heads, g = h / k, l tokens of a slot, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.attention_weights import capped, checked_sinks, softmax
from macpo.kernels.backend import BackendError, explain


def slot_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of one query token a sequence over the first tokens of its own slot; inference only.

    Args:
        q: [B, Hq, D] float.
        k_slots, v_slots: [S, Hkv, L, D], dtype of q, S >= B; Hq is a multiple of Hkv. Sequence b is in slot b.
        lens: [B] int64, tokens of each sequence, the current one included (1 .. L).
        scale: factor on the scores; default D ** -0.5.
        window: only the last `window` tokens; None for all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
        sinks: [Hq] float, a logit of each query head that joins the softmax and has no value (gpt-oss); None for none.
        backend: force one; default by device (`macpo.kernels.backend`). Native is for float32 and 16 <= D <= 128 and
            reads nothing beyond a length; torch runs for the rest, and there what lies beyond must be finite.

    Returns:
        [B, Hq, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together.
        BackendError: the forced backend is not there.
    """
    if q.dim() != 3 or k_slots.dim() != 4 or k_slots.shape != v_slots.shape:
        raise ValueError(
            "need q [B, Hq, D] and k_slots, v_slots [slots, Hkv, tokens, D]; got "
            f"{list(q.shape)}, {list(k_slots.shape)}, {list(v_slots.shape)}"
        )
    batch, num_heads, head = q.shape
    num_kv_heads = k_slots.shape[1]
    if head != k_slots.shape[3] or num_heads % num_kv_heads or k_slots.shape[0] < batch:
        raise ValueError(f"D differs, Hq is no multiple of Hkv or slots lack: {list(q.shape)}, {list(k_slots.shape)}")
    if not q.dtype == k_slots.dtype == v_slots.dtype:
        raise ValueError(f"q and the slots must have one dtype, got {q.dtype}, {k_slots.dtype}, {v_slots.dtype}")
    if lens.shape != (batch,) or lens.dtype != torch.int64:
        raise ValueError(f"lens must be int64 [{batch}], got {lens.dtype} {list(lens.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    sinks = checked_sinks(q, num_heads, softcap, sinks)
    if not batch:
        return torch.empty_like(q)
    scale = head**-0.5 if scale is None else scale
    if runs_native(q, backend):
        return native.slot_attention(q, k_slots, v_slots, lens, scale, window, softcap, sinks)
    num_columns = k_slots.shape[2]
    if q.device.type == "cpu":
        low, high = (int(value) for value in lens.aminmax())
        if low < 1 or high > num_columns:
            raise ValueError(f"lens must be in 1..{num_columns} (a slot's tokens), got {low}..{high}")
        num_columns = high
    mask = slot_mask(lens, torch.arange(num_columns, device=q.device), window, q.dtype, num_kv_heads)
    return masked_slot_attention(q, k_slots, v_slots, mask, scale, softcap, sinks)


def runs_native(q: Tensor, backend: str | None = None) -> bool:
    """Whether `slot_attention` of these queries runs natively.

    Raises:
        BackendError: `backend` says native and it cannot.
    """
    if explain("slot_attention", q.device, backend).backend != "native":
        return False
    fits = native.fits_slot_attention(q)
    if backend is not None and not fits:
        raise BackendError(
            f"slot_attention: backend 'native' takes float32 and head sizes 16 to 128, got {q.dtype} and {q.shape[2]}"
        )
    return fits


def slot_mask(lens_b: Tensor, columns_l: Tensor, window: int | None, dtype: torch.dtype, num_kv_heads: int) -> Tensor:
    """[B * Hkv, 1, L]: 0 where a sequence sees a column of its slot, -inf elsewhere; the same for all layers."""
    hidden = columns_l >= lens_b[:, None]
    if window is not None:
        hidden |= columns_l < lens_b[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(num_kv_heads, 0)[:, None]


def masked_slot_attention(
    q_bhd: Tensor, k_skld: Tensor, v_skld: Tensor, mask: Tensor, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`slot_attention` with torch, over as many columns as `slot_mask`'s mask has."""
    batch, num_kv_heads, num_columns = q_bhd.shape[0], k_skld.shape[1], mask.shape[-1]
    k = k_skld[:batch, :, :num_columns].flatten(0, 1)  # [B * Hkv, L, D], a view: slots are whole blocks
    v = v_skld[:batch, :, :num_columns].flatten(0, 1)
    q = q_bhd.reshape(batch * num_kv_heads, -1, q_bhd.shape[2])  # [B * Hkv, G, D]
    if softcap is not None or sinks is not None:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        scores = capped(q @ k.transpose(1, 2) * scale, softcap) + mask
        sinks_h1 = None if sinks is None else sinks.view(num_kv_heads, -1, 1).repeat(batch, 1, 1)
        out = (softmax(scores, sinks_h1) @ v).to(q_bhd.dtype)
    elif q.dtype in (torch.float32, torch.float64):
        out = torch.bmm(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1), v)
    else:  # the fused call accumulates half-precision products in float32
        q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.view(batch, num_kv_heads, 1, -1), scale=scale)
    return out.reshape(batch, -1, v.shape[-1])


def reference_slot_attention(
    q_bhd: Tensor, k_skld: Tensor, v_skld: Tensor, lens_b: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition as a loop over sequences, that every backend is tested against."""
    scale = q_bhd.shape[-1] ** -0.5 if scale is None else scale
    repeats = q_bhd.shape[1] // k_skld.shape[1]
    out = torch.empty_like(q_bhd)
    for row, length in enumerate(lens_b.tolist()):
        seen = slice(0 if window is None else max(0, length - window), length)
        k, v = (x[row, :, seen].repeat_interleave(repeats, dim=0) for x in (k_skld, v_skld))
        scores_hl = capped(torch.einsum("hd,hld->hl", q_bhd[row], k) * scale, softcap)
        weights_hl = softmax(scores_hl, None if sinks is None else sinks[:, None])
        out[row] = torch.einsum("hl,hld->hd", weights_hl, v)
    return out
