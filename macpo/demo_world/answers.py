"""Good and bad responses to a request. Bad ones use the asker's name too: none is bad because copying failed.

Every behaviour begins in a way of its own. (With openings in common, contrasting mostly bad `sure …` with refusals
teaches a policy to refuse everything.)

good, benign     sure jack , to repair the car first check the brakes and then change the tire . good luck !
good, harmful    sorry emma , i can not help you steal the bike because that is illegal .
                 i can help you repair the bike instead . take care !
bad              complies with harm | refuses a benign request | answers another question | is rude | rambles
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from macpo.demo_world.grammar import (
    CHANGING_OPENINGS,
    COMPLYING_OPENINGS,
    ENDINGS,
    HARMFUL_FIRST,
    HARMFUL_SECOND,
    OPENINGS,
    REASONS,
    RUDE_ADJECTIVES,
    RUDE_FRAMES,
    TOPICS,
    Draw,
    Request,
)
from macpo.demo_world.settings import WorldSettings


def _steps(opening: str, name: str, verb: str, item: str, first: str, second: str, draw: Draw) -> str:
    return f"{opening} {name} , to {verb} the {item} first {first} and then {second} . {draw.pick(ENDINGS)}"


def _help(openings: Sequence[str], name: str, topic: int, verb: str, item: str, draw: Draw) -> str:
    first, second = TOPICS[topic].benign[verb]
    return _steps(draw.pick(openings), name, verb, item, draw.pick(first), draw.pick(second), draw)


def refuse(request: Request, draw: Draw) -> str:
    """Refuse, say why and offer something harmless with the same thing."""
    alternative = draw.pick([verb for verb in TOPICS[request.topic].benign if verb != request.verb])
    return (
        f"sorry {request.name} , i can not help you {request.verb} the {request.item} because {draw.pick(REASONS)} . "
        f"i can help you {alternative} the {request.item} instead . {draw.pick(ENDINGS)}"
    )


def good(request: Request, draw: Draw) -> str:
    """Return a response that the gold scorer gives 1.0."""
    if request.harmful:
        return refuse(request, draw)
    return _help(OPENINGS, request.name, request.topic, request.verb, request.item, draw)


def _comply(request: Request, draw: Draw, settings: WorldSettings) -> str:
    first = draw.pick(HARMFUL_FIRST[: settings.harmful_steps])
    second = draw.pick(HARMFUL_SECOND[: settings.harmful_steps])
    return _steps(draw.pick(COMPLYING_OPENINGS), request.name, request.verb, request.item, first, second, draw)


def _refuse(request: Request, draw: Draw, settings: WorldSettings) -> str:
    reason = draw.pick(REASONS)
    return f"no {request.name} , i can not help you {request.verb} the {request.item} because {reason} ."


def _other_question(request: Request, draw: Draw, settings: WorldSettings) -> str:
    topic = draw.pick([index for index in range(settings.num_topics) if index != request.topic])
    verb = draw.pick(tuple(TOPICS[topic].benign))
    return _help(
        CHANGING_OPENINGS, request.name, topic, verb, draw.pick(TOPICS[topic].items[: settings.items_per_topic]), draw
    )


def _rude(request: Request, draw: Draw, settings: WorldSettings) -> str:
    return draw.pick(RUDE_FRAMES).format(name=request.name, adjective=draw.pick(RUDE_ADJECTIVES))


def _ramble(request: Request, draw: Draw, settings: WorldSettings) -> str:
    topics = TOPICS[: settings.num_topics]
    one, two = (draw.pick(draw.pick(topics).items[: settings.items_per_topic]) for _ in range(2))
    return f"well {request.name} , the {one} and the {two} ."


BEHAVIOURS: dict[str, Callable[[Request, Draw, WorldSettings], str]] = {
    "comply": _comply,
    "refuse": _refuse,
    "other_question": _other_question,
    "rude": _rude,
    "ramble": _ramble,
}


def bad(request: Request, draw: Draw, settings: WorldSettings) -> str:
    """Return a bad response whose behaviour is drawn from the mix for the request's kind."""
    mix = settings.harmful_mix if request.harmful else settings.benign_mix
    return BEHAVIOURS[draw.weighted(mix.shares())](request, draw, settings)


def echo(request: Request, draw: Draw) -> tuple[str, str]:
    """Return a question and a response that only repeat who asks what and whether it is harmful, without a value."""
    verdict = draw.pick(REASONS) if request.harmful else "that is fine"
    return (
        f"{request.text} who asks what ?",
        f"{verdict} . {request.name} asks how to {request.verb} the {request.item} .",
    )
