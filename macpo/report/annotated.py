"""What people said of a run's responses, for the report: from `annotation.json` (macpo/annotation/results.py)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from macpo.engine.errors import MacpoError
from macpo.engine.files import read_bytes, sha256
from macpo.report.policy_names import named
from macpo.report.run_reader import RunReader

log = logging.getLogger(__name__)

ANNOTATION, RESULT = "annotation", "annotation.json"
Interval = tuple[float, float]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Pair(_Shape):
    first: str
    second: str
    items: int
    win: int
    tie: int
    lose: int
    equal: int
    unjudged: int
    win_rate: float | None
    interval: Interval | None
    verdict: str


class _Agreement(_Shape):
    items: int
    alpha: float | None
    interval: Interval | None


class _Share(_Shape):
    count: int
    of: int


class _Person(_Shape):
    repeats_same: _Share
    gold_right: _Share


class _Result(_Shape):
    pairs: tuple[_Pair, ...]
    agreement: _Agreement
    people: dict[str, _Person]
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class Annotated:
    """A table with one row a pair of policies, and sentences below it. People are counted, not named."""

    num_people: int
    rows: list[list[str]]
    notes: list[str]


HEADINGS = ("policy", "opponent", "pairs", "win", "tie", "lose", "win rate", "verdict")


def annotated(run: RunReader) -> Annotated | None:
    """What people said, as `macpo annotate RUN --report` last counted it; None where nobody did.

    A file that cannot be read is left out, with a line.
    """
    path = run.path / ANNOTATION / RESULT
    if not os.path.lexists(path):
        return None
    try:
        found = _Result.model_validate_json(read_bytes(path))
    except (MacpoError, ValidationError) as error:
        why = error.problems[0].message if isinstance(error, MacpoError) else "it has another shape"
        log.warning("%s is ignored: %s; `macpo annotate RUN --report` writes it again", path, why)
        return None
    return Annotated(len(found.people), [_row(pair) for pair in found.pairs], _notes(run, found))


def _row(pair: _Pair) -> list[str]:
    counts = map(str, (pair.items, pair.win, pair.tie, pair.lose))
    return [pair.first, pair.second, *counts, _estimate(pair.win_rate, pair.interval), pair.verdict]


def _notes(run: RunReader, found: _Result) -> list[str]:
    people, agreement = found.people.values(), found.agreement
    notes = []
    for pair in found.pairs:
        if pair.unjudged:
            notes.append(f"{pair.first} against {pair.second}: {pair.unjudged} pairs are not judged yet")
        if pair.equal:
            notes.append(f"{pair.first} and {pair.second} gave the same response to {pair.equal} prompts")
    if agreement.items:
        alpha = _estimate(agreement.alpha, agreement.interval)
        notes.append(f"Krippendorff’s alpha {alpha} over {agreement.items} pairs")
    for what, shares in (
        ("the same verdict on pairs shown again with the sides swapped", [person.repeats_same for person in people]),
        ("the human data’s choice on gold checks", [person.gold_right for person in people]),
    ):
        if of := sum(share.of for share in shares):
            notes.append(f"{what}: {sum(share.count for share in shares)} of {of}")
    changed = [policy for policy, digest in found.sources.items() if _digest(run, policy) != digest]
    return [*notes, *(f"the run’s responses of {policy} have changed since people saw them" for policy in changed)]


def _digest(run: RunReader, policy: str) -> str | None:
    try:
        return sha256(named(run, policy).responses)
    except MacpoError:
        return None


def _estimate(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
