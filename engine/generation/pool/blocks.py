"""Keys and values in blocks: tensors at fixed addresses, and which sequences hold which block.

A sequence's token t lies at `pool[table[t // block_tokens], t % block_tokens]` of its block table. The samples of a
request share the blocks that its prompt fills; each gets a copy of the prompt's partial last block and its own blocks
for the longest possible response when it starts, so no running sequence ever lacks one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.scheduler import Need
from macpo.kernels import write_kv

TRASH = 0
"""Block that no sequence holds: padding rows read it, nothing writes it."""


class BlockAllocator:
    """Blocks 1 .. num_blocks and how many sequences hold each; pure Python and deterministic."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))
        self._holders = [0] * (num_blocks + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, block: int) -> int:
        """Number of sequences that hold a block."""
        return self._holders[block]

    def open(self, need: Need, num_samples: int) -> list[list[int]]:
        """Allocates the block tables of a request's samples, the shared blocks first.

        Raises:
            ValueError: too few blocks are free; nothing is allocated then.
        """
        wanted = need.blocks(num_samples)
        if wanted > len(self._free):
            raise ValueError(f"{num_samples} samples take {wanted} blocks, {len(self._free)} are free")
        shared = [self._free.pop() for _ in range(need.shared)]
        tables = [shared + [self._free.pop() for _ in range(need.own)] for _ in range(num_samples)]
        for block in (block for table in tables for block in table):
            self._holders[block] += 1
        return tables

    def close(self, table: Sequence[int]) -> None:
        """Releases an ended sequence's blocks; those that no sequence holds any more are free.

        Raises:
            ValueError: no sequence holds a block of the table.
        """
        for block in table:
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)


class KVPool:
    """Keys and values [num_blocks + 1, block_tokens, Hkv, D] per layer, zeros at first, at addresses that never change.

    Args:
        num_blocks: number of blocks besides the trash block.
        layers: what each layer caches; k and v must be equally wide (`pool_why_not`).
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, layers: Mapping[int, CacheShape], device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._layers = {
            layer: tuple(
                torch.zeros(num_blocks + 1, block_tokens, shape.num_heads, width, dtype=shape.dtype, device=device)
                for width in (shape.k_dim, shape.v_dim)
            )
            for layer, shape in layers.items()
        }

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's whole k and v."""
        k, v = self._layers[layer]
        return k, v

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [T, Hkv, D] to slots [T] int64 (block * block_tokens + offset; -1: none); returns the pools."""
        pools = self.layer(layer)
        write_kv(k, v, *pools, slots)
        return pools

    def copy(self, layer: int, sources: Tensor, targets: Tensor) -> None:
        """Copies whole blocks, sources [n] int64 to targets [n] int64."""
        for pool in self.layer(layer):
            pool.index_copy_(0, targets, pool.index_select(0, sources))
