"""The two attention contexts of generation: prompts that fill the cache, and one token a sequence that reads it.

Legend: T packed tokens, W cache writes, n sequences, Hq query heads, Hkv key-value heads, G = Hq / Hkv,
C columns of the cache that are read, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macpo.engine.errors import ConfigError
from macpo.engine.generation.kv_cache import SlotCache
from macpo.kernels import Segments, prefix_attention


class PrefillAttention:
    """Packed prompts attend to themselves; their keys and values go to the slots of all their samples."""

    def __init__(self, cache: SlotCache, lengths: Sequence[int], slots: Sequence[Sequence[int]], device: torch.device):
        """Prompt i has `lengths[i]` tokens and fills the cache slots `slots[i]`."""
        self.segments = Segments.from_lengths([(length, []) for length in lengths]).to(device)
        self.cache = cache
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        self.last_rows = (starts + torch.tensor(list(lengths)) - 1).to(device)  # [prompts]
        copies = [
            (start, n, slot) for start, n, own in zip(starts.tolist(), lengths, slots, strict=True) for slot in own
        ]
        self._token = torch.cat([torch.arange(start, start + n) for start, n, _ in copies]).to(device)  # [W]
        self._position = torch.cat([torch.arange(n) for _, n, _ in copies]).to(device)
        self._slot = torch.cat([torch.full((n,), slot) for _, n, slot in copies]).to(device)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        self.cache.write(_layer(module), k[self._token], v[self._token], self._slot, self._position)
        return prefix_attention(q, k, v, self.segments, scale=scale, window=window)[None]


class DecodeAttention:
    """Slots 0 .. n-1 get one token each at `positions` and see their own columns up to it.

    One object serves one forward: the mask is made once and used by every layer.
    """

    def __init__(self, cache: SlotCache, rows: Tensor, positions: Tensor, columns: Tensor):
        """rows = arange(n), positions [n], columns = arange(C) with C above every live position."""
        self.cache = cache
        self.rows = rows
        self.positions = positions
        self.columns = columns
        self.num_columns = columns.numel()
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}

    @property
    def windows(self) -> set[int | None]:
        """The windows that layers have asked for."""
        return {window for window, _, _ in self._masks}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        n, num_kv_heads, head = k.shape[2], k.shape[1], k.shape[3]
        k_pool, v_pool = self.cache.write(
            _layer(module), k[0].transpose(0, 1), v[0].transpose(0, 1), self.rows, self.positions
        )
        kind = (window, q.dtype, num_kv_heads)
        mask = self._masks.get(kind)
        if mask is None:
            mask = self._masks[kind] = self._mask(*kind)
        k_bch = k_pool[:n, :, : self.num_columns].flatten(0, 1)  # [n * Hkv, C, D], a view: slots are whole blocks
        v_bch = v_pool[:n, :, : self.num_columns].flatten(0, 1)
        q_bgh = q[0].transpose(0, 1).reshape(n * num_kv_heads, -1, head)  # [n * Hkv, G, D]
        if q.dtype == torch.float32:
            weights = torch.baddbmm(mask, q_bgh, k_bch.transpose(1, 2), alpha=scale).softmax(-1)
            out = torch.bmm(weights, v_bch)
        else:  # the fused call accumulates half-precision products in float32
            out = F.scaled_dot_product_attention(
                q_bgh.unflatten(0, (n, -1)), k_bch.unflatten(0, (n, -1)), v_bch.unflatten(0, (n, -1)),
                attn_mask=mask.view(n, num_kv_heads, 1, -1), scale=scale,
            ).flatten(0, 1)  # fmt: skip
        return out.view(1, n, -1, v_bch.shape[-1])

    def _mask(self, window: int | None, dtype: torch.dtype, num_kv_heads: int) -> Tensor:
        """[n * Hkv, 1, C], 0 or -inf."""
        last = self.positions[:, None]
        hidden = self.columns > last
        if window is not None:
            hidden |= self.columns <= last - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat_interleave(num_kv_heads, 0)[:, None]


def _layer(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ConfigError(f"{type(module).__name__} does not know its layer index", "use another architecture")
    return index
