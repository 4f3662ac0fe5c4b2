"""The three sets of prompts: disjoint, seeded, drawn by distinct prompt."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macpo.data.preferences import split
from macpo.engine.data.records import Pair, Prompt
from macpo.engine.errors import DataError


def make_pairs(sizes: list[int]) -> list[Pair]:
    return [Pair(Prompt.of(f"question {i}"), f"good {j}", f"bad {j}") for i, n in enumerate(sizes) for j in range(n)]


@given(sizes=st.lists(st.integers(1, 4), min_size=6, max_size=30), seed=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_splits_are_disjoint_seeded_and_by_prompt(sizes: list[int], seed: int) -> None:
    pairs = make_pairs(sizes)
    sets = split(pairs, teacher=2, student=2, test=1, seed=seed)
    ids = [{p.prompt.id for p in part} for part in (sets.teacher, sets.student, sets.test, sets.rest)]
    assert [len(part) for part in ids] == [2, 2, 1, len(sizes) - 5]
    assert len(set().union(*ids)) == len(sizes)  # disjoint, and nothing is lost
    assert len(sets.student) == 2
    assert len(sets.test) == 1
    for part in (sets.teacher, sets.rest):  # every pair of a prompt
        wanted = {p.prompt.id for p in part}
        assert sorted(map(repr, part)) == sorted(repr(p) for p in pairs if p.prompt.id in wanted)
    assert split(pairs, teacher=2, student=2, test=1, seed=seed) == sets
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    again = split(shuffled, teacher=3, student=1, test=1, seed=seed)
    assert [p.prompt for p in again.test] == [p.prompt for p in sets.test]  # the other sizes do not move it


def test_split_seed_matters_and_too_few_prompts_are_named() -> None:
    pairs = make_pairs([2] * 20)
    drawn = {tuple(p.prompt.id for p in split(pairs, teacher=5, student=5, test=5, seed=s).test) for s in range(5)}
    assert len(drawn) == 5
    with pytest.raises(DataError, match=r"20 distinct prompts \(of 40 pairs\) are fewer than the 21 .*7.*8.*6"):
        split(pairs, teacher=7, student=8, test=6, seed=0)
