"""Builds the demo world: splits of the prompts, pretraining text, noisy human labels, clean responses.

documents["teacher"], documents["student"]   good and bad behaviour alike, and echoes that attach no value
teachers[k]    human pairs of teacher k: few, and wrong in most ways to ask outside the topics that its labellers know
student        prompts that the teachers answer; chosen is clean, and only the ceiling may read it
test           prompts for evaluation only
dev            prompts for choices such as the best teacher
copying        echoes over prompts of their own: has a pretrained model learnt to copy?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macpo.demo_world.grammar import (
    ENDINGS,
    EVASIONS,
    FRAMES,
    GRADES,
    HARMFUL_FIRST,
    HARMFUL_SECOND,
    NAMES,
    OPENINGS,
    REASONS,
    RUDE_ADJECTIVES,
    RUDE_FRAMES,
    TOPICS,
    VAGUE,
    Draw,
    Request,
    requests,
)
from macpo.demo_world.responses import bad, echo, good, graded
from macpo.demo_world.settings import WorldSettings
from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.errors import ConfigError

WORDS_PER_LINE = 30


@dataclass(frozen=True, slots=True)
class World:
    """All text of one demo world. No prompt is in two of the sets, nor in two teachers' pairs."""

    documents: dict[str, list[Example]]
    """Pretraining corpora, "teacher" and "student"; a document that is no dialogue has a prompt without messages."""
    teachers: list[list[Pair]]
    """Human preference pairs, one list a teacher."""
    student: list[Pair]
    """The student half. Only the ceiling may read its responses."""
    test: list[Pair]
    """Prompts for evaluation, with a good and a bad response."""
    dev: list[Pair]
    """The same for choices that are not to be made on the test prompts."""
    copying: list[Example]
    """Echo questions on prompts of their own, to judge a base model without looking at values."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with its prompt, hashed once."""

    request: Request
    prompt: Prompt


def build(settings: WorldSettings, seed: int, num_teachers: int = 3) -> World:
    """Build the world of a seed. Splits, corpora and each teacher's pairs do not depend on `num_teachers`.

    Raises ConfigError if `teacher_prompts` does not suffice for `teacher_pairs` prompts a teacher.
    """
    if num_teachers < 1:
        raise ConfigError("the demo world needs a teacher", "give at least one", field="teachers")
    needed = num_teachers * settings.teacher_pairs
    if needed > settings.teacher_prompts:
        raise ConfigError(
            f"{num_teachers} teachers with {settings.teacher_pairs} pairs each need {needed} prompts, "
            f"{settings.teacher_prompts} are set aside",
            f"set teacher_prompts to {needed} or more, or lower teacher_pairs",
            field="teacher_prompts",
        )
    left = iter(Draw(seed, "split").shuffled(_ask_all(settings)))
    test = [next(left) for _ in range(settings.test_prompts)]
    student = [next(left) for _ in range(settings.student_prompts)]
    copying = [next(left) for _ in range(settings.copy_prompts)]
    labelled = [next(left) for _ in range(settings.teacher_prompts)]
    dev = [next(left) for _ in range(settings.dev_prompts)]
    common = list(left)

    size = settings.teacher_pairs
    copy_draw = Draw(seed, "copying")
    return World(
        documents={
            "teacher": _corpus(common, settings.teacher_documents, seed, "teacher", settings),
            "student": _corpus(common, settings.student_documents, seed, "student", settings),
        },
        teachers=[
            _label(labelled[k * size : (k + 1) * size], errors(settings, seed, k), Draw(seed, "labels", k), settings)
            for k in range(num_teachers)
        ],
        student=_clean(student, Draw(seed, "student"), settings),
        test=_clean(test, Draw(seed, "test"), settings),
        dev=_clean(dev, Draw(seed, "dev"), settings),
        copying=[_echo(asked, copy_draw) for asked in copying],
    )


def own_topics(settings: WorldSettings, teacher: int) -> tuple[int, ...]:
    """Return the topics that teacher k's labellers know: a window on the ring of topics."""
    start = teacher * settings.own_topics_step
    return tuple((start + i) % settings.num_topics for i in range(settings.own_topics))


def errors(settings: WorldSettings, seed: int, teacher: int) -> frozenset[tuple[str, int]]:
    """Return the ways to ask, (verb, frame), in which teacher k's labellers choose bad responses.

    In a topic that they know these are `bad_chosen_own` of all ways, in any other `bad_chosen_other`, as near as whole
    numbers come.
    """
    own, wrong = own_topics(settings, teacher), set()
    for index, topic in enumerate(TOPICS[: settings.num_topics]):
        share = settings.bad_chosen_own if index in own else settings.bad_chosen_other
        draw = Draw(seed, "errors", teacher, index)
        for verbs in (tuple(topic.benign), topic.harmful):
            ways = draw.shuffled([(verb, frame) for verb in verbs for frame in range(len(FRAMES))])
            exact = share * len(ways)
            wrong.update(ways[: int(exact) + draw.chance(exact % 1)])
    return frozenset(wrong)


def vocabulary() -> list[str]:
    """Return every word of the full world, sorted."""
    text = [*NAMES, *OPENINGS, *ENDINGS, *REASONS, *VAGUE, *EVASIONS, *HARMFUL_FIRST, *HARMFUL_SECOND, *RUDE_ADJECTIVES]
    for topic in TOPICS:
        text += [*topic.items, *topic.benign, *topic.harmful]
        text += [step for steps in topic.benign.values() for step in steps]
    text += [frame.format(name="", adjective="") for frame in RUDE_FRAMES]
    words = {word for phrase in text for word in phrase.split()}
    plain = Draw("vocabulary")
    for harmful in (False, True):
        for frame in range(len(FRAMES)):
            verb = next(iter(TOPICS[0].harmful if harmful else TOPICS[0].benign))
            request = Request(0, TOPICS[0].items[0], verb, harmful, NAMES[0], frame)
            words.update(request.text.split(), good(request, plain).split())
            words.update(word for part in echo(request, plain) for word in part.split())
    return sorted(words | {"well"})


def _ask_all(settings: WorldSettings) -> list[_Asked]:
    every = requests(settings.num_topics, settings.items_per_topic, settings.num_names)
    return [_Asked(request, Prompt.of(request.text)) for request in every]


def _corpus(common: Sequence[_Asked], size: int, seed: int, role: str, settings: WorldSettings) -> list[Example]:
    """Build a corpus: the list of words, so that a tokenizer knows each of them, then documents of mixed behaviour."""
    draw, words = Draw(seed, "corpus", role), vocabulary()
    lines = [words[i : i + WORDS_PER_LINE] for i in range(0, len(words), WORDS_PER_LINE)][:size]
    documents = [Example(Prompt.of(()), " ".join(line), by="corpus") for line in lines]
    for _ in range(size - len(documents)):
        asked = draw.pick(common)
        if draw.chance(settings.echo_share):
            documents.append(_echo(asked, draw))
        elif draw.chance(settings.good_share):
            documents.append(Example(asked.prompt, graded(asked.request, draw, settings)[0], by="corpus"))
        else:
            documents.append(Example(asked.prompt, bad(asked.request, draw, settings, role), by="corpus"))
    return documents


def _echo(asked: _Asked, draw: Draw) -> Example:
    question, response = echo(asked.request, draw)
    return Example(Prompt.of(question), response, by="corpus")


def _label(
    asked: Sequence[_Asked], wrong: frozenset[tuple[str, int]], draw: Draw, settings: WorldSettings
) -> list[Pair]:
    """Build pairs whose chosen response is bad in the ways to ask of `wrong`, and good of some grade elsewhere."""
    pairs = []
    for one in asked:
        request = one.request
        if (request.verb, request.frame) in wrong:
            chosen = bad(request, draw, settings)
            rejected = _other_bad(request, chosen, draw, settings)
        else:
            chosen, grade = graded(request, draw, settings)
            if grade > 1 and draw.chance(settings.rejected_less):
                rejected = good(request, draw, draw.pick(range(1, grade)))
            else:
                rejected = bad(request, draw, settings)
        pairs.append(Pair(one.prompt, chosen, rejected))
    return pairs


def _clean(asked: Sequence[_Asked], draw: Draw, settings: WorldSettings) -> list[Pair]:
    return [Pair(one.prompt, good(one.request, draw, GRADES), bad(one.request, draw, settings)) for one in asked]


def _other_bad(request: Request, chosen: str, draw: Draw, settings: WorldSettings) -> str:
    """Return a bad response that differs from the chosen one."""
    response = bad(request, draw, settings)
    while response == chosen:
        response = bad(request, draw, settings)
    return response
