"""What people are shown: which pairs of responses, on which sides, and who judges which. All follows from a seed.

A design names pairs of policies and a number of prompts. Every pair is judged on the same prompts. Each person gets an
own order and own sides, sees some pairs a second time with the sides swapped, and, if wanted, some pairs of human
responses of which the data say which one is better.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pair: TypeAlias = tuple[str, str]
"""Two policies; the first one wins or loses."""

CHOSEN, REJECTED = "chosen", "rejected"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Design(_Closed):
    """How pairs of responses are drawn and divided among people."""

    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    """Pairs of policies, each like ("student@3", "student@0")."""
    prompts: Annotated[int, Field(ge=1)] = 100
    """Test prompts on which every pair is judged."""
    annotators: Annotated[int, Field(ge=1, le=100)] = 3
    """People for whom items are dealt out."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the people who judge each item, rounded to whole people, at least one."""
    repeats: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of a person's pairs that come a second time with the sides swapped."""
    gold_checks: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Pairs of human responses, chosen against rejected, as a share of a person's pairs."""
    seed: int = 0

    @property
    def judges(self) -> int:
        """How many people judge each item."""
        return max(1, share(self.annotators, self.overlap))

    @model_validator(mode="after")
    def _makes_sense(self) -> Design:
        for first, second in self.pairs:
            if first == second:
                raise ValueError(f"{first} is paired with itself")
        if len({frozenset(pair) for pair in self.pairs}) < len(self.pairs):
            raise ValueError("a pair of policies is named twice")
        return self


class Item(_Closed):
    """Two responses to one prompt, in the order of their policies."""

    id: str
    kind: Literal["pair", "gold"] = "pair"
    policies: Pair
    """For a gold check ("chosen", "rejected")."""
    prompt_id: str
    prompt: tuple[dict[str, Any], ...]
    answers: tuple[str, str]
    finished: tuple[bool, bool] = (True, True)
    """Whether each response ended by itself, not at the length limit."""


class Showing(_Closed):
    """One item as one person gets it."""

    id: str
    item: str
    swapped: bool
    """Whether the second policy's response stands on the left."""
    repeat: bool = False


def draw(*parts: object) -> int:
    """Return a number of 64 bits that depends on the parts alone: the same on every machine and in every version."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def name_of(*parts: object) -> str:
    """Return an identity of 16 hexadecimal digits that tells nothing about the parts."""
    return f"{draw(*parts):016x}"


def share(of: float, fraction: float) -> int:
    """Return a fraction of a number, rounded half up."""
    return math.floor(of * fraction + 0.5)


def deal(items: Sequence[Item], design: Design) -> list[list[str]]:
    """Return the ids of the items that each person judges, one list a person.

    With overlap 1 everybody judges everything. Otherwise an item goes first to the people with the fewest items, among
    them to those who share the fewest items with the ones chosen before: equal numbers of items for people and for
    pairs of people are the two conditions of a balanced incomplete block design (Cochran and Cox, Experimental Designs,
    1957, chapter 11), met here as far as a choice item by item allows. Gold checks go to everybody.
    """
    people = range(design.annotators)
    dealt: list[list[str]] = [[] for _ in people]
    load: Counter[int] = Counter()
    together: Counter[frozenset[int]] = Counter()
    pairs = sorted((item for item in items if item.kind == "pair"), key=lambda item: draw(design.seed, "deal", item.id))
    for item in pairs:
        chosen: list[int] = []
        while len(chosen) < design.judges:
            chosen.append(
                min(
                    (person for person in people if person not in chosen),
                    key=lambda p: (
                        load[p],
                        sum(together[frozenset((p, other))] for other in chosen),
                        draw(design.seed, "who", item.id, p),
                    ),
                )
            )
        for person in chosen:
            dealt[person].append(item.id)
        load.update(chosen)
        together.update(frozenset(two) for two in combinations(chosen, 2))
    for item in items:
        if item.kind == "gold":
            for person in people:
                dealt[person].append(item.id)
    return dealt


def showings(items: Sequence[str], gold: frozenset[str], person: int, design: Design) -> list[Showing]:
    """Return what one person is shown, in order: the items in an own order, and repeats half of the way later.

    The first half of the order is where repeated items stand, so that about half of all items lie between an item and
    its repetition. Gold checks are not repeated.
    """
    seed = design.seed
    order = sorted(items, key=lambda item: draw(seed, "order", person, item))
    half = math.ceil(len(order) / 2)
    swapped = {item: bool(draw(seed, "side", person, item) % 2) for item in order}
    placed = [
        (float(at), Showing(id=name_of(seed, person, item, 1), item=item, swapped=swapped[item]))
        for at, item in enumerate(order)
    ]
    early = [(at, item) for at, item in enumerate(order[:half]) if item not in gold]
    early.sort(key=lambda found: draw(seed, "repeat", person, found[1]))
    for at, item in early[: share(len([item for item in order if item not in gold]), design.repeats)]:
        again = Showing(id=name_of(seed, person, item, 2), item=item, swapped=not swapped[item], repeat=True)
        placed.append((at + half + 0.5, again))
    return [showing for _, showing in sorted(placed, key=lambda found: found[0])]


def items_of(
    design: Design, responses: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> tuple[list[Item], dict[str, list[str]]]:
    """Return the items of a design, and by pair of policies the prompts to which both gave the same response.

    Args:
        responses: rows of `evaluation.jsonl` by prompt id, by policy.

    Prompts are drawn by hash among those that every policy answered. Responses that are equal to the character are a
    tie that nobody needs to be asked about.
    """
    shared = set.intersection(*(set(responses[policy]) for pair in design.pairs for policy in pair))
    prompts = sorted(shared, key=lambda prompt: draw(design.seed, "prompt", prompt))[: design.prompts]
    items, equal = [], {}
    for first, second in design.pairs:
        same = equal[pair_name((first, second))] = list[str]()
        for prompt in prompts:
            a, b = responses[first][prompt], responses[second][prompt]
            if a["answer"] == b["answer"]:
                same.append(prompt)
                continue
            items.append(
                Item(
                    id=name_of("pair", first, second, prompt, a["answer"], b["answer"]),
                    policies=(first, second),
                    prompt_id=prompt,
                    prompt=tuple(a["prompt"]),
                    answers=(a["answer"], b["answer"]),
                    finished=(bool(a.get("finished", True)), bool(b.get("finished", True))),
                )
            )
    return items, equal


def pair_name(pair: Pair) -> str:
    """Return a pair as the command line has it, "student@3:student@0"."""
    return f"{pair[0]}:{pair[1]}"
