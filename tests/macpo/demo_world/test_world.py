"""The text of the demo world: seeded, disjoint, learnable by tiny models, with labels that err as people do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from macpo.demo_world import World, WorldSettings, build, gold, own_topics
from macpo.demo_world.build import errors, vocabulary
from macpo.demo_world.grammar import (
    FRAMES,
    GRADES,
    RUDE_WORDS,
    TOPICS,
    requests_by_text,
)  # fmt: skip
from macpo.demo_world.settings import BenignMix, Habits, HarmfulMix
from macpo.engine.data.records import Pair
from macpo.engine.errors import ConfigError

SMALL = WorldSettings(
    teacher_documents=600,
    student_documents=700,
    teacher_pairs=40,
    teacher_prompts=200,
    student_prompts=60,
    test_prompts=50,
    copy_prompts=30,
)


@pytest.fixture(scope="module")
def world() -> World:
    return build(WorldSettings(), seed=7)


def texts(world: World) -> list[str]:
    """Every prompt with its response, one text each, over all sets."""
    pairs = [pair for group in (*world.teachers, world.student, world.test) for pair in group]
    examples = [*world.documents["teacher"], *world.documents["student"], *world.copying]
    answered = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
    answered += [(example.prompt, example.response) for example in examples]
    return [" ".join([*(m["content"] for m in prompt.messages), response]) for prompt, response in answered]


def fingerprint(world: World) -> str:
    return hashlib.sha256(repr(world).encode()).hexdigest()


def is_benign(messages: tuple[dict[str, str], ...]) -> bool:
    request = requests_by_text().get(messages[0]["content"]) if messages else None
    return request is not None and not request.harmful


def mean_gold(pairs: list[Pair], side: str) -> float:
    return sum(gold(pair.prompt.messages, getattr(pair, side)) for pair in pairs) / len(pairs)


# --- the corpus -------------------------------------------------------------------------------------------------


def test_default_world_has_the_sizes_that_its_settings_name(world: World) -> None:
    assert {name: len(documents) for name, documents in world.documents.items()} == {
        "teacher": 24_000,
        "student": 28_000,
    }
    assert [len(pairs) for pairs in world.teachers] == [400, 400, 400]
    assert (len(world.student), len(world.test), len(world.copying)) == (512, 400, 200)


def test_build_is_fast() -> None:
    start = time.process_time()
    build(WorldSettings(), seed=8)
    assert time.process_time() - start < 3.0


def test_same_seed_same_world_other_seed_other_world() -> None:
    assert fingerprint(build(SMALL, 1)) == fingerprint(build(SMALL, 1))
    assert fingerprint(build(SMALL, 1)) != fingerprint(build(SMALL, 2))


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_text_does_not_depend_on_hash_randomisation(hash_seed: str) -> None:
    code = (
        "import sys, hashlib; from macpo.demo_world import *; "
        "settings = WorldSettings.model_validate_json(sys.argv[1]); "
        "print(hashlib.sha256(repr(build(settings, 1)).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SMALL.model_dump_json()],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == fingerprint(build(SMALL, 1))


@pytest.mark.parametrize("num_teachers", [1, 2, 3, 4, 5])
def test_number_of_teachers_changes_nothing_but_the_number_of_teachers(num_teachers: int) -> None:
    one, many = build(SMALL, 3, num_teachers=1), build(SMALL, 3, num_teachers=num_teachers)
    assert len(many.teachers) == num_teachers
    assert (one.documents, one.student, one.test, one.copying) == (
        many.documents,
        many.student,
        many.test,
        many.copying,
    )
    assert one.teachers[0] == many.teachers[0]


def test_too_many_teachers_for_the_prompts_set_aside() -> None:
    with pytest.raises(ConfigError, match=r"6 teachers with 40 pairs each need 240 prompts, 200 are set aside"):
        build(SMALL, 0, num_teachers=6)
    with pytest.raises(ConfigError, match="at least one"):
        build(SMALL, 0, num_teachers=0)


def test_own_topics_roll_over_the_ring() -> None:
    assert [own_topics(WorldSettings(), k) for k in range(5)] == [
        (0, 1, 2, 3),
        (3, 4, 5, 6),
        (6, 7, 0, 1),
        (1, 2, 3, 4),
        (4, 5, 6, 7),
    ]
    assert own_topics(WorldSettings(num_topics=4, own_topics=2, own_topics_step=3), 1) == (3, 0)


def test_no_distinct_prompt_is_in_two_sets(world: World) -> None:
    def asked(messages: tuple[dict[str, str], ...]) -> str:  # an echo question counts as the request that it quotes
        return messages[0]["content"].removesuffix(" who asks what ?")

    corpus = {asked(d.prompt.messages) for name in world.documents for d in world.documents[name] if d.prompt.messages}
    held_out = [
        [asked(row.prompt.messages) for row in rows]
        for rows in (*world.teachers, world.student, world.test, world.copying)
    ]
    flat = [text for texts_ in held_out for text in texts_]
    assert len(flat) == len(set(flat)) == 3 * 400 + 512 + 400 + 200
    assert not corpus & set(flat)
    assert corpus | set(flat) <= set(requests_by_text())
    assert len(corpus) > 8000  # nearly all that is left: copying is learnt from variety


def test_corpora_hold_good_bad_and_neutral_text(world: World) -> None:
    dialogues = [d for d in world.documents["student"] if d.prompt.messages]
    echoes = [d for d in dialogues if d.prompt.messages[0]["content"].endswith(" who asks what ?")]
    responses = [d for d in dialogues if not d.prompt.messages[0]["content"].endswith(" who asks what ?")]
    good_share = sum(gold(d.prompt.messages, d.response) >= 0.6 - 1e-9 for d in responses) / len(responses)
    assert len(echoes) / len(dialogues) == pytest.approx(0.25, abs=0.02)
    assert good_share == pytest.approx(0.25, abs=0.02)


def test_good_responses_of_corpora_and_people_have_the_grades_that_the_settings_share_out(world: World) -> None:
    settings = WorldSettings()
    scores = [gold(d.prompt.messages, d.response) for d in world.documents["teacher"] if is_benign(d.prompt.messages)]
    found = [sum(score == pytest.approx(0.6 + 0.1 * grade) for score in scores) for grade in range(1, GRADES + 1)]
    assert [count / sum(found) for count in found] == pytest.approx(list(settings.detail), abs=0.03)


def test_each_role_has_its_own_bad_habits() -> None:
    only = {"teacher": "rude", "student": "evade"}
    habits = {
        f"{role}_habits": Habits(harmful=HarmfulMix(**{name: 1.0}), benign=BenignMix(**{name: 1.0}))
        for role, name in only.items()
    }
    world = build(SMALL.model_copy(update=habits), 1)
    for role, other in (("teacher", "student"), ("student", "teacher")):
        responses = [d.response for d in world.documents[role] if d.prompt.messages]
        is_rude, evades = (
            [bool(set(response.split()) & RUDE_WORDS) for response in responses],
            ["not sure what" in response or "it depends on" in response for response in responses],
        )
        seen = {"rude": any(is_rude), "evade": any(evades)}
        assert seen[only[role]] and not seen[only[other]]


def test_every_word_is_known_to_a_tokenizer_of_either_corpus(world: World) -> None:
    words = {word for text in texts(world) for word in text.split()}
    assert words == set(vocabulary())
    for documents in (*world.documents.values(), *build(SMALL, 1).documents.values()):
        seen = {
            w for d in documents for m in (*d.prompt.messages, {"content": d.response}) for w in m["content"].split()
        }
        assert seen == set(vocabulary())
    assert len(words) < 400


def test_text_is_lower_case_words_between_single_blanks_and_short(world: World) -> None:
    ids = {word: i for i, word in enumerate(vocabulary())}
    by_id = vocabulary()
    for text in texts(world):
        tokens = [ids[word] for word in text.split(" ")]
        assert " ".join(by_id[token] for token in tokens) == text == text.lower()
        assert len(tokens) + 3 <= 56  # with USER: and ASSISTANT: and the end


def test_closed_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match=r"sum to 1\.1, not to 1"):
        HarmfulMix(comply=0.55, rude=0.55)
    with pytest.raises(ValidationError, match=r"detail sum to 0\.9, not to 1"):
        WorldSettings(detail=(0.2, 0.3, 0.3, 0.1))
    with pytest.raises(ValidationError, match="leaves nothing"):
        WorldSettings(num_names=4)
    with pytest.raises(ValidationError, match="own_topics"):
        WorldSettings(num_topics=3, own_topics=4)
    with pytest.raises(ValidationError, match="Extra inputs"):
        WorldSettings.model_validate({"teacher_docs": 1})
    assert all(field.description for field in WorldSettings.model_fields.values())


# --- the labels -------------------------------------------------------------------------------------------------


def test_teachers_label_well_in_their_own_topics_only(world: World) -> None:
    for k, pairs in enumerate(world.teachers):
        own = {item for topic in own_topics(WorldSettings(), k) for item in TOPICS[topic].items}
        inside, outside = [], []
        for pair in pairs:
            words = pair.prompt.messages[0]["content"].split()
            (inside if own & set(words) else outside).append(pair)
        assert mean_gold(inside, "chosen") > 0.6  # 0.9 good, of .77 on average
        assert mean_gold(outside, "chosen") < 0.36  # 0.3 good
        assert mean_gold(pairs, "rejected") < mean_gold(pairs, "chosen") - 0.2
        assert all(pair.chosen != pair.rejected for pair in pairs)


def test_labellers_err_by_the_way_to_ask_and_each_teachers_in_ways_of_their_own(world: World) -> None:
    settings = WorldSettings()
    wrong = [errors(settings, 7, k) for k in range(3)]
    for k, pairs in enumerate(world.teachers):
        for pair in pairs:
            request = requests_by_text()[pair.prompt.messages[0]["content"]]
            is_good = gold(pair.prompt.messages, pair.chosen) >= 0.6 - 1e-9
            assert is_good is ((request.verb, request.frame) not in wrong[k])
    assert len(set(wrong)) == 3
    ways = {
        (verb, frame) for topic in TOPICS for verb in (*topic.benign, *topic.harmful) for frame in range(len(FRAMES))
    }
    for k in range(3):
        own = {verb for t in own_topics(settings, k) for verb in (*TOPICS[t].benign, *TOPICS[t].harmful)}
        known = {way for way in ways if way[0] in own}
        assert len(wrong[k] & known) / len(known) == pytest.approx(0.1, abs=0.06)
        assert len(wrong[k] - known) / len(ways - known) == pytest.approx(0.7, abs=0.06)


def test_share_of_responses_rejected_beside_a_better_one_of_the_same_kind() -> None:
    pairs = build(WorldSettings(bad_chosen_own=0.0, bad_chosen_other=0.0), 3).teachers[0]
    less = [pair for pair in pairs if gold(pair.prompt.messages, pair.rejected) >= 0.6 - 1e-9]
    assert all(gold(p.prompt.messages, p.rejected) < gold(p.prompt.messages, p.chosen) for p in less)
    assert len(less) / len(pairs) == pytest.approx(0.8 * 0.8, abs=0.06)  # a fifth has the lowest grade


def test_student_and_test_pairs_are_clean(world: World) -> None:
    for pairs in (world.student, world.test):
        assert {gold(pair.prompt.messages, pair.chosen) for pair in pairs} == {1.0}
        assert mean_gold(pairs, "rejected") < 0.05


def test_smaller_worlds_use_only_their_topics_names_and_steps() -> None:
    tiny = WorldSettings(
        num_topics=3, items_per_topic=2, num_names=6, harmful_steps=2, own_topics=2, teacher_documents=900,
        student_documents=30, teacher_pairs=20, teacher_prompts=60, student_prompts=40, test_prompts=40,
        copy_prompts=10,
    )  # fmt: skip
    world = build(tiny, 5)
    words = {w for d in world.documents["teacher"] if d.prompt.messages for w in d.response.split()}
    assert {"soup", "stew", "hedge", "rose", "car", "bike", "mask", "midnight"} <= words
    assert not words & {"rice", "rabbit", "anna", "bribe"}
    assert len(world.documents["student"]) == 30
