"""Keys and values of the running sequences: one contiguous slot per sequence, dense from slot 0.

S slots, Hkv key-value heads, L tokens of a slot, D head size, n live slots, T tokens.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from macpo.engine.generation.model_facts import CacheShape


class SlotCache:
    """Keys and values [S, Hkv, L, D] per layer; the tokens of a sequence lie at their positions.

    A layer is allocated at its first write, in the shape of what is written. Memory starts as zeros, and what an
    earlier sequence left is finite: a masked column must not turn into NaN through 0 * NaN.
    """

    def __init__(self, num_slots: int, slot_tokens: int) -> None:
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def shapes(self) -> dict[int, CacheShape]:
        """Shapes of the layers that have written so far, by index."""
        return {i: CacheShape(k.shape[1], k.shape[3], v.shape[3], k.dtype) for i, (k, v) in self._layers.items()}

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [T, Hkv, D] at slots and positions [T]; returns the layer's whole k and v."""
        pools = self.pools(layer, k, v)
        for pool, new in zip(pools, (k, v), strict=True):
            pool.transpose(1, 2).index_put_((slots, positions), new)
        return pools

    def pools(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's whole k and v, allocated for tokens like k and v [T, Hkv, D]."""
        if layer not in self._layers:
            shape = (self.num_slots, k.shape[1], self.slot_tokens)
            self._layers[layer] = (zeros((*shape, k.shape[2]), k), zeros((*shape, v.shape[2]), v))
        return self._layers[layer]

    def move(self, moves: Sequence[tuple[int, int]], num_tokens: int) -> None:
        """Copies the first `num_tokens` of slot a to slot b for every (a, b); no target is in use."""
        if not moves:
            return
        source, target = (torch.tensor(slots) for slots in zip(*moves, strict=True))
        for pools in self._layers.values():
            for pool in pools:
                used = pool[:, :, :num_tokens]
                used[target.to(pool.device)] = used[source.to(pool.device)]


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros with the dtype and device of `like`; on a CPU only pages that are written take memory."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # The system provides zeroed pages one by one; torch would write every byte, numpy would ask for pages of 2 MB.
    num_bytes = max(1, math.prod(shape)) * like.dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)
