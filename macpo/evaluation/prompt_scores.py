"""A metric of every policy of a run on every test prompt, from the rows of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from macpo.evaluation.uncertainty import Floats

Row = Mapping[str, Any]


class Policy(NamedTuple):
    """One agent at one iteration; `arm` is empty for the main run."""

    arm: str
    agent: str
    iteration: int


def _preferred(row: Row) -> float | None:
    """1 where the human choice has the higher implicit reward, .5 for a tie; its scale, beta, does not matter."""
    names = ("chosen_logp", "base_chosen_logp", "rejected_logp", "base_rejected_logp")
    found = [_number(row.get(name)) for name in names]
    if None in found:
        return None
    chosen, base_chosen, rejected, base_rejected = (value for value in found if value is not None)
    margin = (chosen - base_chosen) - (rejected - base_rejected)
    return float(margin > 0) + 0.5 * (margin == 0)


OF_PAIRS: dict[str, Callable[[Row], float | None]] = {"preference_accuracy": _preferred}
"""Metrics of human pairs, which say nothing of generated responses; the value of any other stands in the row."""


class PromptScores:
    """Scores [n] and words [n] of every policy: row i is the same prompt and sample for all, NaN where one has none."""

    def __init__(self, metric: str, rows: Callable[[Policy], Iterable[Row] | None]) -> None:
        """`rows`: a policy's rows of `evaluation.jsonl`, read when they are first asked for; None where it has none."""
        self.metric = metric
        self._of_row = OF_PAIRS.get(metric, lambda row: _number(row.get(metric)))
        self._rows = rows
        self._number: dict[tuple[str, int], int] = {}
        self._clusters: list[Hashable] = []
        self._found: dict[Policy, dict[int, tuple[float, float]] | None] = {}

    @property
    def clusters(self) -> Sequence[Hashable]:
        """The cluster of each of the n rows: prompts that begin with one turn, such as all turns of a dialogue."""
        return self._clusters

    def read(self, policies: Iterable[Policy]) -> None:
        """Read the rows of policies now, so that n does not grow between columns of theirs."""
        for policy in policies:
            self._read(policy)

    def columns(self, policies: Sequence[Policy]) -> Floats:
        """Return the scores [n, k] of policies."""
        return self._table(policies, 0)

    def words(self, policies: Sequence[Policy]) -> Floats:
        """Return the number of words [n, k] of their responses."""
        return self._table(policies, 1)

    def _table(self, policies: Sequence[Policy], entry: int) -> Floats:
        found = [self._read(policy) or {} for policy in policies]
        table = np.full((len(self._clusters), len(policies)), np.nan)
        for column, values in enumerate(found):
            table[list(values), column] = [pair[entry] for pair in values.values()]
        return table

    def _read(self, policy: Policy) -> dict[int, tuple[float, float]] | None:
        if policy not in self._found:
            rows = self._rows(policy)
            self._found[policy] = None if rows is None else self._scored(rows)
        return self._found[policy]

    def _scored(self, rows: Iterable[Row]) -> dict[int, tuple[float, float]]:
        seen: dict[str, int] = {}
        found = {}
        for row in rows:
            prompt = str(row.get("prompt_id"))
            seen[prompt] = seen.get(prompt, 0) + 1
            key = (prompt, seen[prompt])
            if key not in self._number:
                self._number[key] = len(self._clusters)
                self._clusters.append(_opening(row))
            value = self._of_row(row)
            if value is not None:
                found[self._number[key]] = (value, float(len(str(row.get("answer", "")).split())))
        return found


@dataclass(frozen=True)
class ScoredRun:
    """A run's summary, and its scores by prompt under the headline metric where its folder has them."""

    summary: Mapping[str, Any]
    scores: PromptScores | None = None


def _opening(row: Row) -> str:
    """The first user turn of a row's prompt, or the prompt's id where it was not written."""
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else []
    said = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
    return str(next(said, row.get("prompt_id")))


def _number(value: Any) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None
