"""The plan of prefix_attention's Triton kernels: what tokens see, which blocks meet, how often and how it is made."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernel_checks import DEVICE, LAYOUTS, TRITON, Kernels, qkvg, segments_of

from macpo.kernels import Segments, plan_attention, prefix_attention, use_backend
from macpo.kernels.prefix_attention import plan
from macpo.kernels.prefix_attention.segments import visible

needs_triton = pytest.mark.parametrize("backend", [TRITON])


@needs_triton
def test_the_plan_is_made_once_a_row(backend, monkeypatch):
    from macpo.kernels.prefix_attention import triton_plan

    calls = []
    make = triton_plan.make
    monkeypatch.setattr(triton_plan, "make", lambda *args: calls.append(args) or make(*args))
    segments = segments_of("pairs")
    q, k, v, _ = qkvg(segments.num_tokens, 1, 1, 64)

    def layers(q, k, v, segments):
        for window in (None, None, 4, 4):
            q = prefix_attention(q, k, v, segments, window=window, backend=backend)
        return q

    layers(q, k, v, segments)
    assert len(calls) == 2
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    compiled(q.detach().requires_grad_(), k, v, segments_of("pairs")).sum().backward()
    assert len(calls) == 4  # a graph that is differentiated merges equal calls
    segments = segments_of("pairs")
    with use_backend(backend):
        plan_attention(segments, [(None, 64), (4, 64)], q.dtype)
    assert len(calls) == 6
    compiled(q.detach().requires_grad_(), k, v, segments).sum().backward()
    assert len(calls) == 6  # what was made before is an input of the graph


WINDOWS = (None, 1, 5, 30)
TILES = (((16, 16), (32, 16)), ((64, 64), (64, 64)), ((32, 16), (16, 64)))  # forward, then keys and values backward


@needs_triton
@pytest.mark.parametrize("window", WINDOWS)
def test_the_kernels_plan_is_the_definition(backend, window):
    """Every entry, of blocks of both kinds and sizes, also where a row has fewer tokens than a block.

    Every two of window, layout and blocks meet; all three together would take the interpreter three times as long.
    """
    from macpo.kernels.prefix_attention import triton_plan

    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (4, 4), generator=g).tolist()  # some 300 tokens: five of the largest blocks
    layouts = [*LAYOUTS.values(), [(prompt, responses) for prompt, *responses in sizes]]
    for place, layout in enumerate(layouts, start=WINDOWS.index(window)):
        s = Segments.from_lengths(layout).to(DEVICE)
        integers = (s.prefix_start, s.prefix_end, s.segment_start)
        visible_3t = plan.visible_keys(*integers, window)
        forward, dkv = TILES[place % len(TILES)]
        found = triton_plan.make(*integers, window, forward, dkv)
        assert torch.equal(found[0], visible_3t)
        for lists, size, by_key in ((found[1], forward, False), (found[2], dkv, True)):
            assert torch.equal(lists, plan.block_lists(visible_3t, *size, by_key=by_key))


@needs_triton
def test_a_plan_is_two_kernels(backend, monkeypatch):
    """Nothing but the launches and empty memory; the definition in torch is about a hundred kernels."""
    from macpo.kernels.prefix_attention import triton_plan

    segments = segments_of("long")
    integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
    launches = []

    class Noted:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    for name in ("bounds_kernel", "lists_kernel"):
        monkeypatch.setattr(triton_plan, name, Noted())
    with Kernels() as made:
        triton_plan.make(*integers, None, (64, 64), (64, 64))
    with Kernels() as defined:
        visible_3t = plan.visible_keys(*integers, None)
        for by_key in (False, True):
            plan.block_lists(visible_3t, 64, 64, by_key=by_key)
    assert (len(launches), made.count) == (2, 0)
    assert defined.count > 90


@pytest.mark.parametrize("window", [None, 1, 4, 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visible_keys_are_the_rule(layout, window):
    segments = segments_of(layout)
    lo, hi, own = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, window)
    token = torch.arange(segments.num_tokens, device=DEVICE)
    key, query = token[None], token[:, None]
    seen = (key >= lo[:, None]) & (key < hi[:, None]) | (key >= own[:, None]) & (key <= query)
    assert torch.equal(seen, visible(segments, 0, segments.num_tokens, window))


@pytest.mark.parametrize("window", [None, 5, 30])
@pytest.mark.parametrize("layout", [*LAYOUTS, "random"])
def test_lists_hold_every_pair_of_blocks_that_meet(layout, window):
    if layout == "random":
        g = torch.Generator().manual_seed(0)
        sizes = torch.randint(1, 40, (12, 4), generator=g).tolist()
        segments = Segments.from_lengths([(prompt, responses) for prompt, *responses in sizes]).to(DEVICE)
    else:
        segments = segments_of(layout)
    num_tokens = segments.num_tokens
    mask = visible(segments, 0, num_tokens, window)
    visible_3t = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, window)
    for block_q, block_k in ((16, 16), (32, 16), (16, 64)):
        by_query = plan.block_lists(visible_3t, block_q, block_k, by_key=False).tolist()
        by_key = plan.block_lists(visible_3t, block_q, block_k, by_key=True).tolist()
        num_extra = num_met = 0
        for m, n in product(range(len(by_query)), range(len(by_key))):
            part = mask[m * block_q : (m + 1) * block_q, n * block_k : (n + 1) * block_k]
            row, column = by_query[m], by_key[n]
            for lists, other in ((row, n), (column, m)):
                full, every = (lists[plan.FIRST : plan.FIRST + lists[i]] for i in (plan.NUM_FULL, plan.NUM_ALL))
                assert (other in every) >= bool(part.any())
                # Whole ones need no bounds: they have all their tokens.
                assert (other in full) <= (bool(part.all()) and part.shape == (block_q, block_k))
                assert len(set(every)) == len(every)
            listed = n in row[plan.FIRST : plan.FIRST + row[plan.NUM_ALL]]
            assert listed == (m in column[plan.FIRST : plan.FIRST + column[plan.NUM_ALL]])
            num_met += bool(part.any())
            num_extra += listed and not part.any()
        # Bounds are of whole blocks, so where a window cuts inside one, a neighbour may be visited in vain.
        assert num_extra <= (0 if window is None else 0.1 * num_met)


def test_most_blocks_of_a_long_prompt_need_no_mask():
    """8k prompt, four responses of 256: the tiles of head size 128 on a large GPU."""
    segments = Segments.from_lengths([(8192, [256] * 4)])
    visible_3t = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, None)
    for block_q, block_k, by_key in ((128, 64, False), (64, 128, True)):
        lists = plan.block_lists(visible_3t, block_q, block_k, by_key=by_key)
        full, every = lists[:, plan.NUM_FULL].sum(), lists[:, plan.NUM_ALL].sum()
        assert full > 0.96 * every
        needed = visible(segments, 0, segments.num_tokens, None).sum() / (block_q * block_k)
        assert every < 1.03 * needed


def test_group_bounds_are_found():
    for groups in (*LAYOUTS.values(), [(3, [2, 3])] * 5):
        s = Segments.from_lengths(groups)
        assert tuple(plan.group_bounds(s.prefix_start, s.prefix_end, s.segment_start).tolist()) == s.bounds
