"""Philox4x32-10 in torch integers: counter-based noise that does not depend on the batch, the order or the device.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants of the Random123 library.

Counter words of one draw (Gumbel noise of one vocabulary entry takes one lane of a block of four):
    word 0   request id, low 32 bits
    word 1   request id, high 31 bits
    word 2   position (22 bits) | attempt (10 bits)  << 22
    word 3   vocabulary index // 4 (20 bits) | sample (12 bits) << 20
    lane     vocabulary index % 4
Key words: the seed's low and high 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

POSITION_BITS, ATTEMPT_BITS, BLOCK_BITS, SAMPLE_BITS = 22, 10, 20, 12


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of noise from four counter words and two key words: int64 tensors that hold 32-bit values.

    The words may have any shapes that broadcast. int64 products wrap at 2 ** 64, so shift and mask give exact halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def token_words(seed: Tensor, request_keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for every (row, token): int64 [B, K].

    Args:
        seed: [B] int64.
        request_keys: [B, 3] int64: request id, sample, attempt.
        positions: [B] int64.
        tokens: [B, K] int64, vocabulary indices.
    """
    request, sample, attempt = (word[:, None] for word in request_keys.unbind(1))
    block = tokens >> 2
    counter = (
        request & MASK,
        (request >> 32) & MASK,
        positions[:, None] | (attempt << POSITION_BITS),
        block | (sample << BLOCK_BITS),
    )
    key = (seed[:, None] & MASK, (seed[:, None] >> 32) & MASK)
    lanes = torch.stack(torch.broadcast_tensors(*philox(counter, key)), dim=-1)
    return lanes.gather(-1, (tokens & 3)[..., None]).squeeze(-1)


def uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1) from the top 23 bits: (w + 1/2) * 2 ** -23, exact, so never 0 and never 1."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), float32."""
    return -torch.log(-torch.log(uniform(words)))
