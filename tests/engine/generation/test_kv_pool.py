"""The block pool: nothing leaks, nothing is freed twice, and what samples share is not written after the fork."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macpo.engine.generation import Request, SamplingParams
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.pool.blocks import TRASH, BlockAllocator, KVPool
from macpo.engine.generation.pool.capacity import BUCKETS, bucket_of, buckets_up_to, plan_pool
from macpo.engine.generation.scheduler import Need, Scheduler
from macpo.engine.generation.vocabulary import Vocabulary

BLOCK_TOKENS = 16


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 5), st.randoms()), max_size=30),
)
def test_every_block_is_free_or_held_by_those_that_have_it(
    num_blocks: int, steps: list[tuple[int, int, int, Any]]
) -> None:
    """After every opening and closing, in any order; at the end all are free and nobody holds one."""
    blocks, live = BlockAllocator(num_blocks), []

    def look() -> None:
        held = [block for table in live for block in table]
        assert TRASH not in held
        assert all(blocks.holders(block) == held.count(block) for block in range(1, num_blocks + 1))
        assert blocks.num_free == num_blocks - len(set(held))

    for shared, own, num_samples, random in steps:
        need = Need(shared, own)
        if need.blocks(num_samples) <= blocks.num_free:
            before = {block for table in live for block in table}
            tables = blocks.open(need, num_samples)
            assert all(len(table) == len(set(table)) == shared + own for table in tables)
            assert len({block for table in tables for block in table}) == need.blocks(num_samples)
            assert not before & {block for table in tables for block in table}
            live += tables
        else:
            free = blocks.num_free
            with pytest.raises(ValueError, match="are free"):
                blocks.open(need, num_samples)
            assert blocks.num_free == free
        look()
        random.shuffle(live)
        for _ in range(random.randint(0, len(live))):
            blocks.close(live.pop())
            look()
    for table in live:
        blocks.close(table)
    assert blocks.num_free == num_blocks
    assert not any(blocks.holders(block) for block in range(num_blocks + 1))
    if num_blocks:
        with pytest.raises(ValueError, match="freed twice"):
            blocks.close([1])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 6), st.sampled_from([16, 32, 64]))
def test_responses_lie_in_blocks_of_their_own(prompt: int, new: int, num_samples: int, block_tokens: int) -> None:
    """Every position from the fork on is in a block with one holder; before it the full blocks are the same for all."""
    need = Need.of(prompt, prompt + new, block_tokens)
    blocks = BlockAllocator(need.blocks(num_samples))
    tables = blocks.open(need, num_samples)
    assert blocks.num_free == 0
    slots = {(table[t // block_tokens], t % block_tokens) for table in tables for t in range(prompt, prompt + new)}
    assert len(slots) == num_samples * new
    assert all(blocks.holders(block) == 1 for block, _ in slots)
    full = prompt // block_tokens
    assert all(table[:full] == tables[0][:full] for table in tables)
    assert all(blocks.holders(block) == num_samples for block in tables[0][:full])


def test_the_pool_writes_and_copies_where_it_is_told() -> None:
    """Each layer has heads of its own; padding goes nowhere; the rest keeps its zeros."""
    layers = {0: CacheShape(2, 4, 4, torch.float32), 3: CacheShape(1, 6, 6, torch.bfloat16)}
    pool = KVPool(3, BLOCK_TOKENS, layers, torch.device("cpu"))
    for layer, shape in layers.items():
        k, v = torch.randn(2, 3, shape.num_heads, shape.k_dim).to(shape.dtype)
        slots = torch.tensor([BLOCK_TOKENS + 5, -1, 2 * BLOCK_TOKENS])
        k_pool, v_pool = pool.write(layer, k, v, slots)
        assert k_pool is pool.layer(layer)[0]
        assert torch.equal(k_pool[1, 5], k[0]) and torch.equal(v_pool[2, 0], v[2])
        pool.copy(layer, torch.tensor([1]), torch.tensor([3]))
        assert torch.equal(k_pool[3], k_pool[1]) and torch.equal(v_pool[3, 5], v[0])
        assert not k_pool[TRASH].any() and int((k_pool != 0).any(-1).any(-1).sum()) == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=20),
    st.integers(1, 16),
    st.integers(0, 200),
    st.randoms(),
)
def test_what_is_admitted_fits_and_everything_starts_once(
    sizes: list[tuple[int, int, int]], max_batch: int, spare_tokens: int, random: Any
) -> None:
    """Pools that hold one request's sample and a little more; sequences end in any order."""
    requests = [
        Request(f"{i:02d}", (5,) * prompt, SamplingParams(max_new_tokens=new), tuple(range(n)))
        for i, (prompt, n, new) in enumerate(sizes)
    ]
    room = -(-max(prompt + new for prompt, _, new in sizes) // BLOCK_TOKENS) * BLOCK_TOKENS + spare_tokens
    plan = plan_pool(
        requests, lambda r: r.params.max_new_tokens, num_stop_ids=0, vocabulary=Vocabulary(9),
        block_tokens=BLOCK_TOKENS, max_batch=max_batch, max_cache_tokens=room,
    )  # fmt: skip
    assert plan.num_blocks * BLOCK_TOKENS <= room and 1 <= plan.num_slots <= max_batch

    def need(request: Request) -> Need:
        return plan.needs[len(request.prompt_ids), request.params.max_new_tokens]

    scheduler = Scheduler(requests, plan.num_slots, plan.num_blocks, need)
    blocks, live, started = BlockAllocator(plan.num_blocks), [], []
    num_samples = sum(len(request.samples) for request in requests)
    while len(started) < num_samples or live:
        groups = scheduler.admit(plan.num_slots - len(live), blocks.num_free)
        assert groups or live
        for group in groups:
            live += blocks.open(scheduler.need(group), len(group.samples))
            started += [(group.request.id, sample) for sample in group.samples]
        assert len(live) <= plan.num_slots
        blocks.close(live.pop(random.randrange(len(live))))
    assert sorted(started) == sorted((r.id, sample) for r in requests for sample in r.samples)
    assert blocks.num_free == plan.num_blocks


def test_without_a_bound_the_longest_responses_fit() -> None:
    requests = [Request(str(n), (5,) * n, SamplingParams(max_new_tokens=20), (0, 1)) for n in (3, 40, 17)]
    bounds: dict[str, Any] = {
        "num_stop_ids": 3,
        "vocabulary": Vocabulary(9),
        "block_tokens": BLOCK_TOKENS,
        "max_cache_tokens": None,
    }
    plan = plan_pool(requests, lambda r: 20, max_batch=3, **bounds)
    assert (plan.num_slots, plan.num_blocks) == (3, 4 + 4 + 3)
    assert (plan.shape.table_blocks, plan.shape.stop_ids) == (4, 4)
    assert plan_pool(requests, lambda r: 20, max_batch=99, **bounds).num_slots == 6


def test_buckets() -> None:
    assert [bucket_of(n) for n in (1, 3, 64, 65, 257, 512, 513, 640)] == [1, 4, 64, 96, 384, 512, 640, 640]
    assert buckets_up_to(50) == [1, 2, 4, 8, 16, 32, 64]
    assert buckets_up_to(700) == [*BUCKETS, 640, 768]
