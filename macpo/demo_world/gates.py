"""What may stop a world before a score is looked at: does likelihood give good responses away, does the first word?

Of the text alone, exactly, by going through every way in which the grammar can answer: the area under the curve (AUC)
by which mean log-likelihood per token under a corpus tells its good responses from its bad ones, and how far the first
words of good and bad responses overlap. `python -m bench.evidence.world_gates` prints them, and those of finished runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from macpo.demo_world.grammar import Request, requests
from macpo.demo_world.responses import bad, graded
from macpo.demo_world.settings import WorldSettings

T = TypeVar("T")

AUC = (0.55, 0.80)
FIRST_WORDS = 0.5


class _Scripted:
    """A chooser that takes the given branch at each choice, the first one after them; it notes how many there were."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.widths: list[int] = []
        self.probability = 1.0

    def weighted(self, shares: Sequence[tuple[T, float]]) -> T:
        possible = [(option, share) for option, share in shares if share > 0]
        turn = len(self.widths)
        option, share = possible[self.script[turn] if turn < len(self.script) else 0]
        self.widths.append(len(possible))
        self.probability *= share
        return option

    def pick(self, options: Sequence[T]) -> T:
        return self.weighted([(option, 1 / len(options)) for option in options])

    def chance(self, probability: float) -> bool:
        return self.weighted([(True, probability), (False, 1 - probability)])


def every(choose: Callable[[_Scripted], T]) -> Iterator[tuple[T, float]]:
    """Every way in which a function of a chooser can end, with its probability; they sum to 1."""
    script: list[int] = []
    while True:
        chooser = _Scripted(script)
        result = choose(chooser)
        yield result, chooser.probability
        taken = [*script, *[0] * (len(chooser.widths) - len(script))]
        while taken and taken[-1] + 1 == chooser.widths[len(taken) - 1]:
            taken.pop()
        if not taken:
            return
        script = [*taken[:-1], taken[-1] + 1]


@dataclass(frozen=True)
class TextGates:
    """One corpus and one kind of request."""

    role: str
    harmful: bool
    auc: float
    """P(a good response is likelier per token than a bad one), ties halved."""
    first_words: float
    """Sum over first words of the smaller of its shares among good and among bad responses."""

    @property
    def passed(self) -> bool:
        return AUC[0] <= self.auc <= AUC[1] and self.first_words >= FIRST_WORDS


def text_gates(settings: WorldSettings) -> list[TextGates]:
    """The gates of the text alone, for both corpora and both kinds of request; exact, no model is trained."""
    some = {request.harmful: request for request in reversed(requests(settings.num_topics))}
    return [_text_gates(settings, role, some[harmful]) for role in ("teacher", "student") for harmful in (False, True)]


def _text_gates(settings: WorldSettings, role: str, request: Request) -> TextGates:
    good: dict[str, float] = defaultdict(float)
    for (text, _), p in every(lambda chooser: graded(request, chooser, settings)):
        good[text] += p
    wrong: dict[str, float] = defaultdict(float)
    for text, p in every(lambda chooser: bad(request, chooser, settings, role)):
        wrong[text] += p
    share = settings.good_share

    def per_token(text: str) -> float:
        p = share * good.get(text, 0.0) + (1 - share) * wrong.get(text, 0.0)
        return math.log(p) / (len(text.split()) + 1)  # one more for the end

    points = [(per_token(text), p, 0.0) for text, p in good.items()]
    points += [(per_token(text), 0.0, p) for text, p in wrong.items()]
    return TextGates(role, request.harmful, _auc(points), _overlap(good, wrong))


def _auc(points: list[tuple[float, float, float]]) -> float:
    """From (score, share of the good, share of the bad)."""
    tied: dict[float, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for score, one, other in points:
        both = tied[round(score, 9)]
        both[0] += one
        both[1] += other
    below = area = 0.0
    for _, (one, other) in sorted(tied.items()):
        area += one * (below + other / 2)
        below += other
    return area


def _overlap(good: dict[str, float], wrong: dict[str, float]) -> float:
    first: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, responses in enumerate((good, wrong)):
        for text, p in responses.items():
            first[text.split()[0]][side] += p
    return sum(min(both) for both in first.values())
