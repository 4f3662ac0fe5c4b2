"""Packing: the example of the design, and properties that hold for any groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.errors import DataError

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=12)
GROUPS = st.lists(st.builds(PrefixGroup, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=12)


def test_the_design_example() -> None:
    """The example at the top of pack.py, number for number: prompt 3, chosen 2 and rejected 3 tokens."""
    (batch,) = pack([PrefixGroup([10, 11, 12], [[20, 21], [30, 31, 32]])], max_tokens=8)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.segments.prefix_start.tolist() == [0] * 8
    assert batch.segments.prefix_end.tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    assert batch.segments.segment_start.tolist() == [0, 0, 0, 3, 3, 5, 5, 5]
    assert batch.rows.tolist() == [2, 3, 2, 5, 6]
    assert batch.target.tolist() == [20, 21, 30, 31, 32]
    assert batch.cu_rows.tolist() == [0, 2, 5]
    assert batch.cu_rows.dtype == torch.int32
    assert (batch.groups, batch.max_length, batch.segments.cu_groups) == ((0,), 6, (0, 8))


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 80), st.sampled_from(["ffd", "given"]))
def test_nothing_is_lost_and_the_budget_holds(groups: list[PrefixGroup], max_tokens: int, order: str) -> None:
    batches = pack(groups, max_tokens=max_tokens, order=order)
    assert sorted(i for batch in batches for i in batch.groups) == list(range(len(groups)))
    for batch in batches:
        assert batch.num_tokens <= max_tokens or len(batch.groups) == 1  # a long group has a row of its own
        assert batch.num_tokens == sum(groups[i].num_tokens for i in batch.groups)
        assert torch.equal(batch.segments.positions(), batch.position_ids[0])
        flat = [response for i in batch.groups for response in groups[i].responses]
        bounds = batch.cu_rows.tolist()
        assert [batch.target[a:b].tolist() for a, b in pairwise(bounds)] == flat
        # the row that predicts a token stands one position before it, in the same sequence
        place = 0
        for i in batch.groups:
            for response in groups[i].responses:
                want = range(len(groups[i].prompt_ids) - 1, len(groups[i].prompt_ids) - 1 + len(response))
                rows = batch.rows[place : place + len(response)]
                assert batch.position_ids[0, rows].tolist() == list(want)
                place += len(response)
    if order == "given":
        assert [i for batch in batches for i in batch.groups] == list(range(len(groups)))


@settings(max_examples=30, deadline=None)
@given(GROUPS, st.integers(1, 80))
def test_first_fit_leaves_no_two_rows_that_would_fit_into_one(groups: list[PrefixGroup], max_tokens: int) -> None:
    sizes = [batch.num_tokens for batch in pack(groups, max_tokens=max_tokens)]
    assert all(a + b > max_tokens for k, a in enumerate(sizes) for b in sizes[k + 1 :])


def test_only_the_chosen_groups_are_packed_under_their_own_index() -> None:
    groups = [PrefixGroup([k], [[k] * (k + 1)]) for k in range(5)]
    (batch,) = pack(groups, max_tokens=64, indices=[4, 1])
    assert batch.groups == (4, 1)
    assert batch.target.tolist() == [4] * 5 + [1] * 2


@pytest.mark.parametrize(
    "group",
    [PrefixGroup([], [[1]]), PrefixGroup([1], []), PrefixGroup([1], [[2], []])],
    ids=["no-prompt", "no-response", "empty-response"],
)
def test_a_response_that_cannot_be_predicted_is_refused(group: PrefixGroup) -> None:
    with pytest.raises(DataError, match="has no token"):
        pack([group], max_tokens=8)
