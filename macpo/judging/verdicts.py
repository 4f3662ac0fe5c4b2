"""What a judge said of two responses in both orders, and what follows from the two.

A judge prefers a place as well as a response, so a pair is shown twice with the sides exchanged; a win or a loss counts
only where both orders agree, everything else counts as a tie (Zheng et al. 2023, arXiv 2306.05685, section 3.4).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from macpo.engine.errors import MacpoError
from macpo.judging.questions import Comparison

_VERDICT = re.compile(r"\[\[([ABC])\]\]")

Outcome: TypeAlias = Literal["win", "tie", "lose", "first", "second", "half", "failed"]
"""win, lose: both orders prefer the same response. tie: both say tie. first, second: both prefer the same place,
whatever stands there. half: one says tie, the other does not. failed: an order has no verdict."""


class JudgeError(MacpoError, code=7):
    """The judge failed too often to be believed."""


@dataclass(frozen=True, slots=True)
class Order:
    """A judge's answer to one question.

    Attributes:
        verdict: "A", "B" or "C" as the responses were shown, "" after a failure.
        reply_ids: keys of the replies in `replies.jsonl` that the verdict comes from.
        tokens: those of question and reply, as far as the server says.
        unparsed: replies to this question that named no single verdict.
        models: what the server calls the models that replied.
    """

    verdict: str
    reply_ids: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None
    seconds: float = 0.0
    unparsed: int = 0
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """One comparison with the responses to both questions; `asked` is false where the two responses are equal."""

    comparison: Comparison
    ours_first: Order
    theirs_first: Order
    asked: bool = True

    @property
    def outcome(self) -> Outcome:
        one, two = self.ours_first.verdict, self.theirs_first.verdict
        if not one or not two:
            return "failed"
        if one == two:
            return {"A": "first", "B": "second", "C": "tie"}[one]  # type: ignore[return-value]
        return "half" if "C" in (one, two) else "win" if one == "A" else "lose"

    def rows(self, policy: str, opponent: str) -> list[dict[str, Any]]:
        """One row for each question."""
        found = []
        for first, second, order in (policy, opponent, self.ours_first), (opponent, policy, self.theirs_first):
            row: dict[str, Any] = {"prompt_id": self.comparison.prompt_id, "opponent": opponent}
            row |= {"first": first, "second": second, "verdict": order.verdict or None}
            row |= {"tokens": order.tokens and list(order.tokens), "seconds": round(order.seconds, 3)}
            found.append(row | {"reply_id": list(order.reply_ids)})
        return found


def equal(comparison: Comparison) -> Judgement:
    """Two equal responses are a tie without asking."""
    return Judgement(comparison, Order("C"), Order("C"), asked=False)


def parse(reply: str) -> str | None:
    """Return A, B or C when the reply names exactly one verdict; None for none or for several that differ."""
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def majority(votes: Sequence[str]) -> str:
    """The verdict of several votes: the most frequent one, "C" where the two most frequent are equally so.

    "" where more than half of the votes failed ("").
    """
    given = Counter(vote for vote in votes if vote)
    if 2 * given.total() < len(votes) or not given:
        return ""
    (best, count), *others = given.most_common()
    return "C" if others and others[0][1] == count else best


def check_failures(failed: int, judged: int, total: int, max_failure_rate: float, cache: Path) -> None:
    """Raise JudgeError where more of `total` comparisons than the given share have `failed` for good."""
    if failed > max_failure_rate * total + 1e-9:  # 29% of 100 is 29, also in floating point
        raise JudgeError(
            f"the judge failed on {failed} of the first {judged} comparisons, more than {max_failure_rate:.0%} of "
            f"{total}",
            "see the replies in this file, then run again: answered questions are not asked again",
            file=cache,
        )
