"""Functions of the sampling kernels: noise with the bits of `philox.py`, scores, and their order as integers.

The order of operations that decides a token (penalty, temperature, score + noise) is the reference's, with IEEE
division, so that scores have its bits. Gumbel noise differs from it by the rounding of two logarithms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from macpo.kernels.sampling import philox

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(value) for value in philox.MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(value) for value in philox.WEYL)
ATTEMPT_SHIFT, SAMPLE_SHIFT = tl.constexpr(philox.POSITION_BITS), tl.constexpr(philox.BLOCK_BITS)
LOG2E = tl.constexpr(1.4426950408889634)
# Half a unit of uniform noise below 1: 2 ** -24 is the smallest 1 - u.
NEAR_ONE = tl.constexpr(1.0 - 2.0**-24)
KEY_OF_MINUS_INF = tl.constexpr(-2139095041)
LOWEST_KEY = tl.constexpr(-(2**31))  # below every score's


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; uint32 scalars or tensors. Words that are scalars stay so as long as they can."""
    for _ in tl.static_range(ROUNDS):
        # One wide multiplication gives both halves; tl.umulhi and a product would be two.
        p0, p1 = c0.to(tl.uint64) * MULTIPLIER_0, c2.to(tl.uint64) * MULTIPLIER_1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


@triton.jit
def row_counter(p_seed, p_keys, p_position, row):
    """Counter words 0 to 2, the sample's bits of word 3, and the two key words of a row: uint32 scalars."""
    seed, request = tl.load(p_seed + row), tl.load(p_keys + row * 3)
    sample, attempt = tl.load(p_keys + row * 3 + 1), tl.load(p_keys + row * 3 + 2)
    c2 = (tl.load(p_position + row) | (attempt << ATTEMPT_SHIFT)).to(tl.uint32)
    high = (sample << SAMPLE_SHIFT).to(tl.uint32)
    c0, c1 = request.to(tl.uint32), (request >> 32).to(tl.uint32)
    return c0, c1, c2, high, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def token_words(token, c0, c1, c2, high, k0, k1):
    """32 random bits of each token; int32 scalar or tensor. Computes a whole block of four for every token."""
    w0, w1, w2, w3 = philox_words(c0, c1, c2, (token >> 2).to(tl.uint32) | high, k0, k1)
    lane = token & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def tile_blocks(start, c0, c1, c2, high, k0, k1, LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The random words of the LINES x WIDTH tokens from `start`, a multiple of 8, on, as Philox makes them.

    A thread makes BLOCKS (1 or 2) consecutive blocks of four words of a line: as many tokens as it loads in 16 bytes.
    The second four words are the first's again where BLOCKS is 1.
    """
    column = BLOCKS * tl.arange(0, WIDTH // (4 * BLOCKS))
    block = start // 4 + tl.arange(0, LINES)[:, None] * (WIDTH // 4) + column[None, :]
    a0, a1, a2, a3 = philox_words(c0, c1, c2, block.to(tl.uint32) | high, k0, k1)
    if BLOCKS == 2:
        b0, b1, b2, b3 = philox_words(c0, c1, c2, (block + 1).to(tl.uint32) | high, k0, k1)
    else:
        b0, b1, b2, b3 = a0, a1, a2, a3
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def largest_word(a0, a1, a2, a3, b0, b1, b2, b3, BLOCKS: tl.constexpr):
    """The largest word of `tile_blocks`."""
    top = tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3))
    if BLOCKS == 2:
        top = tl.maximum(top, tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3)))
    return tl.max(tl.max(top, 0), 0)


@triton.jit
def in_token_order(a0, a1, a2, a3, b0, b1, b2, b3, LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The words of `tile_blocks`, one a token: [LINES, WIDTH]."""
    if BLOCKS == 2:
        a0, a1, a2, a3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [LINES, WIDTH])


@triton.jit
def uniform(words):
    """float32 (w // 512 + 1/2) * 2 ** -23, exact: the bits of 1 + k * 2 ** -23, less 1 - 2 ** -24."""
    return ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - NEAR_ONE


@triton.jit
def one_less_uniform(words):
    """1 - uniform(words), exact as well: complementing the bits reflects u at 1/2."""
    return uniform(words ^ 0xFFFFFFFF)


@triton.jit
def gumbel(words):
    """Standard Gumbel noise, float32."""
    return -tl.log(-tl.log(uniform(words)))


@triton.jit
def penalised(x, seen, penalty):
    """Logits after the repetition penalty, float32."""
    return tl.where(seen, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)


@triton.jit
def ordered(score):
    """int32 that orders as the float32 scores do, 0 and -0 being equal. Its own inverse is `unordered`."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float32 score of an `ordered` key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
