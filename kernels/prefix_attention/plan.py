"""Which keys every token sees, as two ranges, and which blocks of keys and queries meet: the definition, in torch.

The kernels' plans are made by `triton_plan`. No step reads a value back to the host, and every shape follows from the
number of tokens and the block sizes, so a plan can be captured in a CUDA graph. Its lists hold an entry for every pair
of blocks: T^2 / (block_q * block_k) integers, 8 MiB at 131,072 tokens and blocks of 128 x 64.

Legend: t tokens, m query blocks, n key blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_FULL, NUM_ALL, FIRST = 0, 1, 2  # columns of a list of blocks


def visible_keys(prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor, window: int | None) -> Tensor:
    """int32 [3, T] = prefix_lo, prefix_hi, own_lo: token i sees the keys `[prefix_lo, prefix_hi)` and `[own_lo, i]`.

    The window is inside the bounds: a prompt's tokens have the positions 0, 1, ... of their group. A token whose
    prefix is empty has its own range there too, so that a block of the prompt's last tokens and the first of a
    response counts as seeing the whole prompt.
    """
    token = torch.arange(prefix_start.numel(), dtype=torch.int32, device=prefix_start.device)
    lo, hi, own = prefix_start, torch.minimum(prefix_end, token + 1), segment_start
    if window is not None:
        position = prefix_end - prefix_start + token - segment_start
        lo = torch.maximum(lo, lo + position - (window - 1))
        own = torch.maximum(own, token - (window - 1))
    empty = lo >= hi
    return torch.stack((torch.where(empty, own, lo), torch.where(empty, token + 1, hi), own))


def block_lists(visible_3t: Tensor, block_q: int, block_k: int, *, by_key: bool) -> Tensor:
    """int32 [m, 2 + n]: for every query block how many key blocks it sees whole, sees at all, and their indices.

    The whole ones come first: no mask is needed there, nor a bound on tokens. Last in a row are those of no use.
    With `by_key` it is [n, 2 + m], the query blocks that see each key block.
    """
    kind_mn = _kinds(visible_3t, block_q, block_k)
    kind = kind_mn.T if by_key else kind_mn
    order = kind.argsort(dim=1, stable=True)
    counts = torch.stack(((kind == 0).sum(1), (kind < 2).sum(1)), 1)
    return torch.cat((counts, order), 1).int()


def _kinds(visible_3t: Tensor, block_q: int, block_k: int) -> Tensor:
    """uint8 [m, n]: 0 every query of the block sees every key of the block, 1 some may, 2 none does."""
    num_tokens = visible_3t.shape[1]
    num_query_blocks = -(-num_tokens // block_q)
    missing = num_query_blocks * block_q - num_tokens
    far = num_tokens + block_k  # beyond every key

    def blocks(x_t: Tensor, padding: int) -> Tensor:
        return F.pad(x_t, (0, missing), value=padding).view(num_query_blocks, block_q)

    lo_t, hi_t, own_t = visible_3t
    device = visible_3t.device
    first_m = torch.arange(num_query_blocks, device=device)[:, None] * block_q
    last_m = (first_m + block_q - 1).clamp_max(num_tokens - 1)
    own_m = blocks(own_t, far).amin(1, keepdim=True)
    # Range 1 is what the prefixes add below range 2, [own_m, last_m]; a prefix inside range 2 adds nothing.
    lo, hi = blocks(lo_t, far), blocks(hi_t, 0)
    below = lo < own_m
    lo_m = lo.where(below, far).amin(1, keepdim=True)
    hi_m = torch.minimum(hi.where(below, 0).amax(1, keepdim=True), own_m)

    start_n = torch.arange(-(-num_tokens // block_k), device=device)[None] * block_k
    stop_n = start_n + block_k
    some = (start_n < hi_m) & (stop_n > lo_m) | (start_n <= last_m) & (stop_n > own_m)
    in_prefix = (start_n >= lo.amax(1, keepdim=True)) & (stop_n <= hi.amin(1, keepdim=True))
    in_own = (start_n >= blocks(own_t, far).amax(1, keepdim=True)) & (stop_n - 1 <= first_m)
    # A last block that is not full of tokens has `far` and 0 among its bounds, so it never counts as whole.
    return 2 - some.to(torch.uint8) - (in_prefix | in_own).to(torch.uint8)


def group_bounds(prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor) -> Tensor:
    """int64 [g + 1]: 0, every later token at which the row can be cut without a token losing a key, and T."""
    token = torch.arange(prefix_start.numel(), device=prefix_start.device)
    lo_t = torch.minimum(torch.where(prefix_start < prefix_end, prefix_start, segment_start), segment_start).long()
    lowest_t = lo_t.flip(0).cummin(0).values.flip(0)
    starts = (lowest_t >= token).nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([prefix_start.numel()])))
