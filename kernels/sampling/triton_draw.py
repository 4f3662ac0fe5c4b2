"""Makes a row's token from its parts: joins the chunks, and draws the rows that have filters.

Every filter keeps the first tokens of one order (score downwards, then id downwards), so what is kept is a score and
an id at which the order is cut. Cuts are found by search over the scores' integer images: the k-th largest score is
the smallest c with fewer than k scores above it, the nucleus' last score the smallest c with less than top_p of the
mass above it, and among equals the id likewise. Each step of a search weighs three values at once.

The search runs over a short list of candidates where one is known to hold every kept token: the tokens at or above the
k-th largest of the groups' maxima (the scan's), of which there are at least k. Otherwise over the whole row, which is
slower and as exact. Masses are float32 sums in float64 comparisons: a nucleus can differ from the reference's where
the mass above a token is within about 1e-6 of top_p.

Legend: y penalised logits, s scores, key `ordered(s)`, p = exp(s - max s).
"""

from __future__ import annotations

import triton
import triton.language as tl

from macpo.kernels.linear_logp.triton_math import finite_or_zero
from macpo.kernels.sampling.triton_noise import (
    KEY_OF_MINUS_INF,
    LOG2E,
    LOWEST_KEY,
    gumbel,
    ordered,
    penalised,
    row_counter,
    token_words,
    unordered,
)
from macpo.kernels.sampling.triton_scan import NO_TOKEN, is_filtered

# The weights of a search: tokens, mass, or ids among tokens of one key.
COUNT, MASS, IDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _entries(
    start, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Score, key (LOWEST_KEY outside) and token of the entries start .. start + BLOCK - 1 of the list or the row."""
    at = start + tl.arange(0, BLOCK)
    mask = at < n
    token = at
    if listed:
        s = tl.load(p_list_s + at, mask=mask, other=float("-inf"))
        token = tl.load(p_list_id + at, mask=mask, other=0)
    else:
        s = tl.load(p_row + at, mask=mask, other=float("-inf")).to(tl.float32)
        if penalty != 1:
            s = penalised(s, tl.load(p_seen_row + at, mask=mask, other=0) != 0, penalty)
        s = tl.div_rn(s, temperature)
    return s, tl.where(mask, ordered(s), LOWEST_KEY), token


@triton.jit
def _weigh(
    key, top_s, tie_key, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mass of the entries above `key`, and how many have `tie_key`: float64."""
    mass, ties = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        s, k, _ = _entries(start, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id, BLOCK)
        mass += tl.where(k > key, tl.exp2((s - top_s) * LOG2E), 0.0)
        ties += (k == tie_key).to(tl.float32)
    return tl.sum(mass.to(tl.float64), 0), tl.sum(ties.to(tl.float64), 0)


@triton.jit
def _cut(
    low, high, target, top_s, tie_key, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Smallest c in low .. high (int64) with less than `target` weight above it; `high` has none above it."""
    while low < high:
        width = high - low
        a, b, c = low + width // 4, low + width // 2, low + width // 2 + width // 4
        above_a = tl.zeros([BLOCK], tl.float32)
        above_b = tl.zeros([BLOCK], tl.float32)
        above_c = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            s, key, token = _entries(
                start, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id, BLOCK
            )
            value, weight = key, tl.full([BLOCK], 1.0, tl.float32)
            if WEIGHT == MASS:
                weight = tl.exp2((s - top_s) * LOG2E)
            if WEIGHT == IDS:
                value, weight = token, (key == tie_key).to(tl.float32)
            above_a += tl.where(value > a.to(tl.int32), weight, 0.0)
            above_b += tl.where(value > b.to(tl.int32), weight, 0.0)
            above_c += tl.where(value > c.to(tl.int32), weight, 0.0)
        if tl.sum(above_a.to(tl.float64), 0) < target:
            high = a
        elif tl.sum(above_b.to(tl.float64), 0) < target:
            low, high = a + 1, b
        elif tl.sum(above_c.to(tl.float64), 0) < target:
            low, high = b + 1, c
        else:
            low = c + 1
    return low


@triton.jit
def _candidates(
    want, top_y, temperature, p_row, p_seen_row, penalty, p_group, p_active, p_list_s, p_list_id,
    vocab, num_groups, group_shift,
    BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Lists every token at or above the want-th largest group maximum. Returns that score and the list's length.

    A length above CAP means that the list is cut short and useless.
    """
    high = ordered(top_y).to(tl.int64)
    low = tl.full([], KEY_OF_MINUS_INF, tl.int64)
    bound_key = _cut(
        low, high, want.to(tl.float64), 0.0, 0, num_groups, num_groups > 0, p_row, p_seen_row, penalty, temperature,
        p_group, p_active, COUNT, BLOCK,
    )  # fmt: skip
    bound = tl.div_rn(unordered(bound_key.to(tl.int32)), temperature)

    num_active = tl.zeros([], tl.int32)
    for start in range(0, num_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        top = tl.load(p_group + group, mask=group < num_groups, other=float("-inf"))
        active = ((tl.div_rn(top, temperature) >= bound) & (group < num_groups)).to(tl.int32)
        tl.store(p_active + num_active + tl.cumsum(active, 0) - 1, group, mask=active != 0)
        num_active += tl.sum(active, 0)
    tl.debug_barrier()  # the list of groups is read by other threads than wrote it

    length = num_active
    if num_active <= CAP:
        length = tl.zeros([], tl.int32)
        num_elements = num_active << group_shift
        for start in range(0, num_elements, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < num_elements
            group = tl.load(p_active + (at >> group_shift), mask=mask, other=0)
            token = (group << group_shift) + (at & ((1 << group_shift) - 1))
            mask = mask & (token < vocab)
            s = tl.load(p_row + token, mask=mask, other=float("-inf")).to(tl.float32)
            if penalty != 1:
                s = penalised(s, tl.load(p_seen_row + token, mask=mask, other=0) != 0, penalty)
            s = tl.div_rn(s, temperature)
            taken = ((s >= bound) & mask).to(tl.int32)
            place = length + tl.cumsum(taken, 0) - 1
            mask = (taken != 0) & (place < CAP)
            tl.store(p_list_s + place, s, mask=mask)
            tl.store(p_list_id + place, token, mask=mask)
            length += tl.sum(taken, 0)
        tl.debug_barrier()
    return bound, length


@triton.jit(do_not_specialize=["plane", "num_splits", "num_groups", "vocab"])
def draw_kernel(
    p_logits, p_seen, p_seed, p_keys, p_position, p_temperature, p_top_p, p_top_k, p_min_p, p_penalty,
    p_part, p_part_id, p_group, p_active, p_list_s, p_list_id,
    p_id, p_raw, p_processed,
    stride_row, stride_seen, plane, num_splits, vocab, num_groups, group_shift,
    FILTERED: tl.constexpr, MAX_SPLITS: tl.constexpr, PROBE: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
):  # fmt: skip
    """One row: ids [B] int64, raw and processed log-probs [B] float32."""
    row = tl.program_id(0).to(tl.int64)
    temperature, penalty = tl.load(p_temperature + row), tl.load(p_penalty + row)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    p_row, p_seen_row = p_logits + row * stride_row, p_seen + row * stride_seen

    split = tl.arange(0, MAX_SPLITS)
    m_split = split < num_splits
    p_own = p_part + row * num_splits + split
    maxima_x = tl.load(p_own, mask=m_split, other=float("-inf"))
    maxima_y = tl.load(p_own + 2 * plane, mask=m_split, other=float("-inf"))
    top_x, top_y = tl.max(maxima_x, 0), tl.max(maxima_y, 0)
    sums_x = tl.load(p_own + plane, mask=m_split, other=0.0)
    sums_y = tl.load(p_own + 3 * plane, mask=m_split, other=0.0)
    total_x = tl.sum(sums_x * tl.exp2((maxima_x - finite_or_zero(top_x)) * LOG2E), 0)
    mass = tl.sum(sums_y * tl.exp2((maxima_y - finite_or_zero(top_y)) * (LOG2E / temperature)), 0)
    scores = tl.load(p_own + 4 * plane, mask=m_split, other=float("-inf"))
    ids = tl.load(p_part_id + row * num_splits + split, mask=m_split, other=0)
    chosen = tl.min(tl.where((scores == tl.max(scores, 0)) & m_split, ids, NO_TOKEN), 0)
    top_s = tl.div_rn(top_y, temperature)

    if FILTERED:  # noqa: SIM102 (known to the compiler, unlike the next)
        if is_filtered(p_temperature, p_top_p, p_top_k, p_min_p, row, vocab):
            top_p, min_p, top_k = tl.load(p_top_p + row), tl.load(p_min_p + row), tl.load(p_top_k + row)
            by_rank = (top_k > 0) & (top_k < vocab)
            want = tl.where(by_rank, top_k, PROBE)
            p_active, p_group = p_active + row * MAX_GROUPS, p_group + row * num_groups
            p_list_s, p_list_id = p_list_s + row * CAP, p_list_id + row * CAP
            listed, n = num_groups < 0, vocab
            if want <= num_groups:
                bound, length = _candidates(
                    want, top_y, temperature, p_row, p_seen_row, penalty, p_group, p_active, p_list_s, p_list_id,
                    vocab, num_groups, group_shift, BLOCK, CAP,
                )  # fmt: skip
                if length <= CAP:
                    inside, _ = _weigh(
                        LOWEST_KEY, top_s, 0, length, length > 0, p_row, p_seen_row, penalty, temperature,
                        p_list_s, p_list_id, BLOCK,
                    )  # fmt: skip
                    in_nucleus = (top_p < 1) & (inside >= top_p.to(tl.float64) * mass)
                    listed = by_rank | in_nucleus | (tl.exp2((bound - top_s) * LOG2E) < min_p)
                    if listed:
                        n = length

            key = tl.full([], KEY_OF_MINUS_INF, tl.int64)  # of the last kept score, so far
            high = ordered(top_s).to(tl.int64)
            total = mass.to(tl.float64)
            if by_rank:
                key = _cut(
                    key, high, top_k.to(tl.float64), top_s, 0, n, listed, p_row, p_seen_row, penalty, temperature,
                    p_list_s, p_list_id, COUNT, BLOCK,
                )  # fmt: skip
                total, _ = _weigh(
                    (key - 1).to(tl.int32), top_s, 0, n, listed, p_row, p_seen_row, penalty, temperature,
                    p_list_s, p_list_id, BLOCK,
                )  # fmt: skip
            last_id = tl.zeros([], tl.int64)
            if top_p < 1:
                target = top_p.to(tl.float64) * total
                key = _cut(
                    key, high, target, top_s, 0, n, listed, p_row, p_seen_row, penalty, temperature,
                    p_list_s, p_list_id, MASS, BLOCK,
                )  # fmt: skip
                above, ties = _weigh(
                    key.to(tl.int32), top_s, key.to(tl.int32), n, listed, p_row, p_seen_row, penalty, temperature,
                    p_list_s, p_list_id, BLOCK,
                )  # fmt: skip
                each = tl.maximum(tl.exp2((unordered(key.to(tl.int32)) - top_s) * LOG2E), 1e-38).to(tl.float64)
                rank = tl.ceil((target - above) / each)  # ties that have less than the target above them
                if rank < ties:
                    last_id = _cut(
                        last_id, last_id + vocab - 1, tl.maximum(rank, 1.0), top_s, key.to(tl.int32), n, listed,
                        p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id, IDS, BLOCK,
                    )  # fmt: skip

            c0, c1, c2, high_bits, k0, k1 = row_counter(p_seed, p_keys, p_position, row)
            best = tl.full([], float("-inf"), tl.float32)
            chosen = tl.full([], NO_TOKEN, tl.int32)
            kept_mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                s, k, token = _entries(
                    start, n, listed, p_row, p_seen_row, penalty, temperature, p_list_s, p_list_id, BLOCK
                )
                p = tl.exp2((s - top_s) * LOG2E)
                kept = ((k > key) | ((k == key) & (token >= last_id))) & (p >= min_p)
                if tl.max(kept.to(tl.int32), 0) > 0:
                    kept_mass += tl.where(kept, p, 0.0)
                    score = tl.where(kept, s + gumbel(token_words(token, c0, c1, c2, high_bits, k0, k1)), float("-inf"))
                    top = tl.max(score, 0)
                    at = tl.min(tl.where((score == top) & kept, token, NO_TOKEN), 0)
                    if (top > best) | ((top == best) & (at < chosen)):
                        best, chosen = top, at
            mass = tl.sum(kept_mass, 0)

    chosen = tl.minimum(tl.maximum(chosen, 0), vocab - 1)  # a row of NaN chooses nothing
    x = tl.load(p_row + chosen).to(tl.float32)
    y = x
    if penalty != 1:
        y = penalised(x, tl.load(p_seen_row + chosen) != 0, penalty)
    processed = tl.div_rn(y, temperature) - top_s - tl.log(mass)
    tl.store(p_id + row, chosen.to(tl.int64))
    tl.store(p_raw + row, x - top_x - tl.log(total_x))
    tl.store(p_processed + row, tl.where(greedy, 0.0, processed))
