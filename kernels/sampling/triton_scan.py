"""The one pass over the logits: maxima and sums of exp, and the winner of rows without filters.

A program reads a chunk of a row; chunks depend on the vocabulary alone, so a row's result does not depend on the
batch. Legend: x raw logits, y penalised logits, s = y / temperature, e = exp(s - max s), u uniform noise, t = 1 - u.

Gumbel-max without a logarithm a token: s + gumbel >= best means -log u <= exp(s - best), and t <= -log u. So only a
token with t <= exp(s - best) can win, which costs one comparison, as e is there for the sum of exp already. The few
that pass (a new best comes up about log V times in a row) are computed exactly, one by one. Most tiles need less: the
least t of a tile (its largest random word) is weighed against the tile's largest score first, and where even
t = 2 ** -24 would not let that score win, noise is not drawn at all. A row's first tile is computed exactly at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from macpo.kernels.linear_logp.triton_math import finite_or_zero
from macpo.kernels.sampling.triton_noise import (
    LOG2E,
    gumbel,
    in_token_order,
    largest_word,
    one_less_uniform,
    penalised,
    row_counter,
    tile_blocks,
    token_words,
)

NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def is_filtered(p_temperature, p_top_p, p_top_k, p_min_p, row, vocab):
    """Whether a row's draw is from less than the vocabulary; rows at temperature 0 draw nothing."""
    top_k = tl.load(p_top_k + row)
    cut = ((top_k > 0) & (top_k < vocab)) | (tl.load(p_top_p + row) < 1) | (tl.load(p_min_p + row) > 0)
    return cut & (tl.load(p_temperature + row) != 0)


@triton.jit
def _threshold(best, top_s):
    """exp(best - top_s), made smaller by more than the rounding of scores, noise and exp together."""
    slack = 1e-5 + 1e-6 * (tl.abs(best) + tl.abs(top_s))
    return tl.exp2((best - top_s - slack) * LOG2E)


@triton.jit
def _load(p_row, start, end, offset, BLOCK: tl.constexpr):
    """Logits of the tile from `start` on, -inf from `end` on. Whole tiles are loaded without a mask, so in 16 bytes."""
    if start + BLOCK <= end:
        x = tl.load(p_row + start + offset)
    else:
        x = tl.load(p_row + start + offset, mask=start + offset < end, other=float("-inf"))
    return x


@triton.jit
def _largest(x):
    """The largest entry of a tile [LINES, WIDTH]; lines first, since each thread holds its own columns."""
    return tl.max(tl.max(x, 0), 0)


@triton.jit
def _first(token, is_it):
    """The smallest token where `is_it` holds."""
    return tl.min(tl.min(tl.where(is_it, token, NO_TOKEN), 0), 0)


@triton.jit(do_not_specialize=["plane", "num_splits", "num_groups", "vocab"])  # a new batch size compiles nothing
def scan_kernel(
    p_logits, p_seen, p_seed, p_keys, p_position, p_temperature, p_top_p, p_top_k, p_min_p, p_penalty,
    p_part, p_part_id, p_group,
    stride_row, stride_seen, plane, num_splits, vocab, chunk, num_groups,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Per chunk: part [5, B, S] float32 (max x, sum, max y, sum, best score) and part_id [B, S] int32.

    GROUP > 0: also the largest y of every GROUP tokens of filtered rows, group [B, num_groups] float32.
    """
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, penalty = tl.load(p_temperature + row), tl.load(p_penalty + row)
    filtered = is_filtered(p_temperature, p_top_p, p_top_k, p_min_p, row, vocab)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    drawn = (filtered | greedy) == 0
    plain = (temperature == 1) & (penalty == 1)  # y and x, and both sums, are the same
    inverse = 1.0 / temperature
    slope = LOG2E * inverse
    c0, c1, c2, high, k0, k1 = row_counter(p_seed, p_keys, p_position, row)

    # A thread has 16 bytes of each line, so that sums and maxima over lines need nothing of other threads.
    BLOCKS: tl.constexpr = 32 // p_logits.dtype.element_ty.primitive_bitwidth
    WIDTH: tl.constexpr = 128 * BLOCKS
    LINES: tl.constexpr = BLOCK // WIDTH
    p_row, p_seen_row = p_logits + row * stride_row, p_seen + row * stride_seen
    begin = split * chunk
    end = tl.minimum(begin + chunk, vocab)
    offset = tl.arange(0, LINES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    max_x = tl.full([], float("-inf"), tl.float32)
    max_y = tl.full([], float("-inf"), tl.float32)
    best = tl.full([], float("-inf"), tl.float32)
    best_id = tl.zeros([], tl.int32) + begin
    sum_x = tl.zeros([WIDTH], tl.float32)
    sum_y = tl.zeros([WIDTH], tl.float32)
    # Three tiles are on their way: with one, 16 to 20 programs a multiprocessor wait for memory most of the time.
    ahead_1 = _load(p_row, begin, end, offset, BLOCK)
    ahead_2 = _load(p_row, begin + BLOCK, end, offset, BLOCK)
    ahead_3 = _load(p_row, begin + 2 * BLOCK, end, offset, BLOCK)
    for start in range(begin, end, BLOCK):
        token = start + offset
        x = ahead_1.to(tl.float32)
        ahead_1, ahead_2 = ahead_2, ahead_3
        ahead_3 = _load(p_row, start + 3 * BLOCK, end, offset, BLOCK)
        top_x = _largest(x)
        y, top_y = x, top_x
        if penalty != 1:
            seen = tl.load(p_seen_row + token, mask=token < end, other=0)
            y = penalised(x, seen != 0, penalty)
            top_y = _largest(y)
        if top_x > max_x:
            sum_x *= tl.exp2((max_x - top_x) * LOG2E)
            max_x = top_x
        below = x - finite_or_zero(max_x)
        e = tl.exp2(below * LOG2E)
        sum_x += tl.sum(e, 0)
        if top_y > max_y:
            sum_y *= tl.exp2((max_y - top_y) * slope)
            max_y = top_y
        if penalty != 1:
            below = y - finite_or_zero(max_y)
        if not plain:
            e = tl.exp2(below * slope)
        sum_y += tl.sum(e, 0)

        if greedy & (top_y > best):
            best = top_y
            best_id = _first(token, y == top_y)
        if drawn:
            top_s = max_y * inverse  # near enough: the slack is for such roundings
            threshold = _threshold(best, top_s)
            top_e = tl.exp2((top_y - finite_or_zero(max_y)) * slope)
            if top_e > threshold * 5.9604644775390625e-08:
                a0, a1, a2, a3, b0, b1, b2, b3 = tile_blocks(start, c0, c1, c2, high, k0, k1, LINES, WIDTH, BLOCKS)
                if best == float("-inf"):  # nothing to beat yet: all of the tile at once
                    words = in_token_order(a0, a1, a2, a3, b0, b1, b2, b3, LINES, WIDTH, BLOCKS)
                    score = tl.div_rn(y, temperature) + gumbel(words)
                    best = _largest(score)
                    best_id = _first(token, score == best)
                elif top_e > one_less_uniform(largest_word(a0, a1, a2, a3, b0, b1, b2, b3, BLOCKS)) * threshold:
                    t = one_less_uniform(in_token_order(a0, a1, a2, a3, b0, b1, b2, b3, LINES, WIDTH, BLOCKS))
                    lead = e - t * threshold
                    top = _largest(lead)
                    while top > 0:
                        at = _first(token, lead == top)
                        y_at = tl.load(p_row + at).to(tl.float32)
                        if penalty != 1:
                            y_at = penalised(y_at, tl.load(p_seen_row + at) != 0, penalty)
                        score_at = tl.div_rn(y_at, temperature) + gumbel(token_words(at, c0, c1, c2, high, k0, k1))
                        if (score_at > best) | ((score_at == best) & (at < best_id)):
                            best, best_id = score_at, at
                        e = tl.where(token == at, -1.0, e)
                        lead = e - t * _threshold(best, top_s)
                        top = _largest(lead)
        if GROUP > 0:  # noqa: SIM102 (known to the compiler, unlike the next)
            if filtered:
                group = start // GROUP + tl.arange(0, BLOCK // GROUP)
                top_g = tl.max(tl.reshape(y, [BLOCK // GROUP, GROUP]), 1)
                tl.store(p_group + row * num_groups + group, top_g, mask=group < num_groups)

    p_own = p_part + row * num_splits + split
    tl.store(p_own, max_x)
    tl.store(p_own + plane, tl.sum(sum_x, 0))
    tl.store(p_own + 2 * plane, max_y)
    tl.store(p_own + 3 * plane, tl.sum(sum_y, 0))
    tl.store(p_own + 4 * plane, best)
    tl.store(p_part_id + row * num_splits + split, best_id)
