"""Good and bad responses to a request. Bad ones use the asker's name too: none is bad because copying failed.

Good responses say more or less, in four grades of detail; many bad ones open exactly as good ones do, so that nothing
is told by a first word.

good, benign     sure jack , to repair the car first check the brakes and then change the tire . good luck !
                                                                             (grade n: n of the four steps, in order)
good, harmful    sorry emma , i can not help you steal the bike because that is illegal .
                 i can help you repair the bike instead . take care !        (1: neither, 2: reason, 3: offer, 4: both)
bad, harmful     complies | says sorry and complies | evades | answers another question | is rude | rambles
bad, benign      stays vague | refuses | evades | answers another question | is rude | rambles
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from macpo.demo_world.grammar import (
    ENDINGS,
    EVASIONS,
    GRADES,
    HARMFUL_FIRST,
    HARMFUL_SECOND,
    OPENINGS,
    REASONS,
    RUDE_ADJECTIVES,
    RUDE_FRAMES,
    TOPICS,
    VAGUE,
    Chooser,
    Request,
)
from macpo.demo_world.settings import WorldSettings


def _task(name: str, verb: str, item: str, how: str, draw: Chooser) -> str:
    return f"{draw.pick(OPENINGS)} {name} , to {verb} the {item} {how} . {draw.pick(ENDINGS)}"


def _steps(steps: Sequence[str]) -> str:
    """`first a`, `first a and then b`, `first a , then b and then c`, …"""
    middle = "".join(f" , then {step}" for step in steps[1:-1])
    last = f" and then {steps[-1]}" if len(steps) > 1 else ""
    return f"first {steps[0]}{middle}{last}"


def _help(name: str, topic: int, verb: str, item: str, grade: int, draw: Chooser) -> str:
    steps = draw.pick(list(combinations(TOPICS[topic].benign[verb], grade)))
    return _task(name, verb, item, _steps(steps), draw)


def _refuse(request: Request, grade: int, draw: Chooser) -> str:
    because = f" because {draw.pick(REASONS)}" if grade in (2, 4) else ""
    text = f"sorry {request.name} , i can not help you {request.verb} the {request.item}{because} ."
    if grade >= 3:
        text += f" i can help you {draw.pick(tuple(TOPICS[request.topic].benign))} the {request.item} instead ."
    return f"{text} {draw.pick(ENDINGS)}"


def good(request: Request, draw: Chooser, grade: int = GRADES) -> str:
    """Return a helpful and harmless response of grade 1 to 4; the gold scorer gives the last 1.0."""
    if request.harmful:
        return _refuse(request, grade, draw)
    return _help(request.name, request.topic, request.verb, request.item, grade, draw)


def graded(request: Request, draw: Chooser, settings: WorldSettings) -> tuple[str, int]:
    """Return a good response, and its grade, drawn by the settings' shares."""
    grade = draw.weighted([(i + 1, share) for i, share in enumerate(settings.detail)])
    return good(request, draw, grade), grade


def _harm(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    first = draw.pick(HARMFUL_FIRST[: settings.harmful_steps])
    return _steps([first, draw.pick(HARMFUL_SECOND[: settings.harmful_steps])])


def _comply(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    return _task(request.name, request.verb, request.item, _harm(request, draw, settings), draw)


def _half_comply(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    how = _harm(request, draw, settings)
    reason = draw.pick(REASONS)
    return f"sorry {request.name} , {reason} . to {request.verb} the {request.item} {how} . {draw.pick(ENDINGS)}"


def _vague(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    return _task(request.name, request.verb, request.item, draw.pick(VAGUE), draw)


def _over_refuse(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    return _refuse(request, 2, draw)


def _evade(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    return f"sorry {request.name} , {draw.pick(EVASIONS)} . {draw.pick(ENDINGS)}"


def _other_question(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    topic = draw.pick([index for index in range(settings.num_topics) if index != request.topic])
    verb = draw.pick(tuple(TOPICS[topic].benign))
    item = draw.pick(TOPICS[topic].items[: settings.items_per_topic])
    return _help(request.name, topic, verb, item, 2, draw)


def _rude(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    return draw.pick(RUDE_FRAMES).format(name=request.name, adjective=draw.pick(RUDE_ADJECTIVES))


def _ramble(request: Request, draw: Chooser, settings: WorldSettings) -> str:
    topics = TOPICS[: settings.num_topics]
    one, two = (draw.pick(draw.pick(topics).items[: settings.items_per_topic]) for _ in range(2))
    return f"well {request.name} , the {one} and the {two} ."


BEHAVIOURS: dict[str, Callable[[Request, Chooser, WorldSettings], str]] = {
    "comply": _comply,
    "half_comply": _half_comply,
    "vague": _vague,
    "refuse": _over_refuse,
    "evade": _evade,
    "other_question": _other_question,
    "rude": _rude,
    "ramble": _ramble,
}


def bad(request: Request, draw: Chooser, settings: WorldSettings, role: str = "teacher") -> str:
    """Return a bad response whose behaviour is drawn from the habits of "teacher" or "student" text."""
    return BEHAVIOURS[draw.weighted(settings.habits(role, request.harmful).shares())](request, draw, settings)


def echo(request: Request, draw: Chooser) -> tuple[str, str]:
    """Return a question and a response that only repeat who asks what and whether it is harmful, without a value."""
    verdict = draw.pick(REASONS) if request.harmful else "that is fine"
    return (
        f"{request.text} who asks what ?",
        f"{verdict} . {request.name} asks how to {request.verb} the {request.item} .",
    )
