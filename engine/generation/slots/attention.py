"""Attention of packed prompts and of decode steps over the slot cache.

Legend: T packed tokens, W cache writes, n sequences, Hq query heads, Hkv key-value heads, C columns of the cache
that are read, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macpo.engine.generation.attention import layer_index, packed_prompts
from macpo.engine.generation.slots.cache import SlotCache
from macpo.kernels import AttentionForm, native, prefix_attention
from macpo.kernels.paged_attention.slots import masked_slot_attention, runs_native, slot_mask


class PrefillAttention:
    """Packed prompts attend to themselves; their keys and values go to the slots of all their samples."""

    def __init__(self, cache: SlotCache, lengths: Sequence[int], slots: Sequence[Sequence[int]], device: torch.device):
        """Prompt i has `lengths[i]` tokens and fills the cache slots `slots[i]`."""
        self.segments, self.last_rows = packed_prompts(lengths, device)
        self.cache = cache
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        copies = [
            (start, n, slot) for start, n, own in zip(starts.tolist(), lengths, slots, strict=True) for slot in own
        ]
        self._token = torch.cat([torch.arange(start, start + n) for start, n, _ in copies]).to(device)  # [W]
        self._position = torch.cat([torch.arange(n) for _, n, _ in copies]).to(device)
        self._slot = torch.cat([torch.full((n,), slot) for _, n, slot in copies]).to(device)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        self.cache.write(layer_index(module), k[self._token], v[self._token], self._slot, self._position)
        return prefix_attention(q, k, v, self.segments, **form._asdict())[None]


class DecodeAttention:
    """Slots 0 .. n-1 get one token each at `positions` and attend to their own columns up to it.

    One object serves one forward: the mask is built once and used by every layer.
    """

    def __init__(self, cache: SlotCache, rows: Tensor, positions: Tensor, columns: Tensor):
        """rows = arange(n), positions [n], columns = arange(C) with C above every live position."""
        self.cache = cache
        self.rows = rows
        self.positions = positions
        self.columns = columns
        self.lens = positions + 1
        self.windows: set[int | None] = set()  # that the layers have asked for
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}
        self._native: dict[tuple[torch.dtype, int], bool] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        q_bhd, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [n, H, D]
        self.windows.add(form.window)
        if k.shape == v.shape and self._is_native(q_bhd):
            pools = self.cache.pools(layer_index(module), k, v)
            return native.slot_attention(q_bhd, *pools, self.lens, **form._asdict(), new_k=k, new_v=v)[None]
        k_pool, v_pool = self.cache.write(layer_index(module), k, v, self.rows, self.positions)
        kind = (form.window, q.dtype, k_pool.shape[1])
        mask = self._masks.get(kind)
        if mask is None:
            mask = self._masks[kind] = slot_mask(self.lens, self.columns, *kind)
        return masked_slot_attention(q_bhd, k_pool, v_pool, mask, form.scale, form.softcap, form.sinks)[None]

    def _is_native(self, q_bhd: Tensor) -> bool:
        """Calls `runs_native` once for all layers of one kind."""
        kind = (q_bhd.dtype, q_bhd.shape[2])
        if kind not in self._native:
            self._native[kind] = runs_native(q_bhd)
        return self._native[kind]
