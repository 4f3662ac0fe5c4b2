"""The sets of prompts: disjoint, seeded, drawn by distinct prompt."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macpo.data.preferences import split
from macpo.data.spool import spooled
from macpo.demo_world import WorldSettings, build
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


@given(sizes=st.lists(st.integers(1, 4), min_size=8, max_size=30), dev=st.integers(0, 3), seed=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_development_prompts_are_taken_from_the_rest_alone(sizes: list[int], dev: int, seed: int) -> None:
    pairs = make_pairs(sizes)
    without = split(pairs, teacher=2, student=2, test=1, seed=seed)
    sets = split(pairs, teacher=2, student=2, test=1, dev=dev, seed=seed)
    assert (sets.teacher, sets.student, sets.test) == (without.teacher, without.student, without.test)
    own, rest = ({pair.prompt.id for pair in part} for part in (sets.dev, sets.rest))
    assert len(sets.dev) == len(own) == dev and not own & rest  # the first pair of each of its prompts
    assert own | rest == {pair.prompt.id for pair in without.rest}


def test_development_prompts_come_from_the_training_side() -> None:
    held_out = spooled(make_pairs([1] * 9)[5:], Pair)
    sets = split(make_pairs([1] * 8), teacher=1, student=1, test=2, dev=2, seed=0, held_out=held_out)
    kept = {pair.prompt.id for pair in make_pairs([1] * 8)} - {pair.prompt.id for pair in sets.test}
    assert len(sets.dev) == 2 and {pair.prompt.id for pair in sets.dev} <= kept
    with pytest.raises(DataError, match=r"student_prompts 3 \+ test_prompts 2 \+ dev_prompts 4"):
        split(make_pairs([1] * 8), teacher=1, student=3, test=2, dev=4, seed=0)


def test_split_seed_matters_and_too_few_prompts_are_named() -> None:
    pairs = make_pairs([2] * 20)
    drawn = {tuple(p.prompt.id for p in split(pairs, teacher=5, student=5, test=5, seed=s).test) for s in range(5)}
    assert len(drawn) == 5
    with pytest.raises(DataError, match=r"20 distinct prompts \(of 40 pairs\) are fewer than the 21 .*7.*8.*6"):
        split(pairs, teacher=7, student=8, test=6, seed=0)


def test_development_prompts_change_neither_the_other_sets_nor_the_labels() -> None:
    small = WorldSettings(
        teacher_documents=60,
        student_documents=70,
        teacher_pairs=10,
        teacher_prompts=40,
        student_prompts=20,
        test_prompts=10,
    )
    plain, more = build(small, 3), build(small.model_copy(update={"dev_prompts": 7}), 3)
    assert (plain.teachers, plain.student, plain.test) == (more.teachers, more.student, more.test)
    dev = {pair.prompt.id for pair in more.dev}
    assert len(dev) == 7 and not plain.dev
    for documents in more.documents.values():
        assert not dev & {document.prompt.id for document in documents}
