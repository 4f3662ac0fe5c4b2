"""Attention of packed prompts and of decode steps over the block pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macpo.engine.generation.attention import layer_index, packed_prompts
from macpo.engine.generation.pool.blocks import KVPool
from macpo.kernels import AttentionForm, paged_attention, prefix_attention
from macpo.kernels.transfer import to_device


class PagedPrefill:
    """Packed prompts attend to themselves; their keys and values go to the blocks of their first samples.

    Where a prompt ends inside a block, each other sample gets a copy of that block to continue in.
    """

    def __init__(
        self, pool: KVPool, lengths: Sequence[int], tables: Sequence[Sequence[Sequence[int]]], device: torch.device
    ) -> None:
        """Prompt i has `lengths[i]` tokens and the block tables `tables[i]`, one per sample."""
        self.segments, self.last_rows = packed_prompts(lengths, device)
        self.pool = pool
        size = pool.block_tokens
        slots, copies = [], []
        for length, (first, *others) in zip(lengths, tables, strict=True):
            token = torch.arange(length)
            slots.append(torch.tensor(first)[token // size] * size + token % size)
            if length % size:
                copies += [(first[length // size], other[length // size]) for other in others]
        self._slots = to_device(torch.cat(slots), device)  # [T]
        self._copies = to_device(torch.tensor(copies).T.contiguous(), device) if copies else None  # [2, copies]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        self.pool.write(layer_index(module), k, v, self._slots)
        if self._copies is not None:
            self.pool.copy(layer_index(module), *self._copies)
        return prefix_attention(q, k, v, self.segments, **form._asdict())[None]


class PagedDecode:
    """One token of each of n sequences is written to its slot and attends to its context through its block table."""

    def __init__(self, pool: KVPool, table: Tensor, lens: Tensor, slots: Tensor) -> None:
        """table [n, L] int32, lens [n] int32 including the new token, slots [n] int64 (-1: not written)."""
        self.pool = pool
        self.table = table
        self.lens = lens
        self.slots = slots

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [n, H, D]
        pools = self.pool.write(layer_index(module), k, v, self.slots)
        return paged_attention(q, *pools, self.table, self.lens, **form._asdict())[None]
