"""A judge that is asked in words: every question to a server, again where that may help, by several votes if wanted.

    ask = Endpoint("https://host/v1", model="some-judge", api_key_env="JUDGE_API_KEY")
    with closing(ask), Replies(folder / "replies.jsonl") as replies:
        judgements = AskingJudge(ask, JudgePrompt("pairwise"), replies, {"model": ask.model}).compare(comparisons)

A reply that was paid for is never asked for again; a question that was under way when the process was killed is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from macpo.engine.connection import RateLimited, Unavailable
from macpo.engine.progress import Count, uncounted
from macpo.judging.questions import Comparison, JudgePrompt
from macpo.judging.replies import Replies, key_of
from macpo.judging.server import Reply
from macpo.judging.verdicts import Judgement, Order, check_failures, equal, majority, parse


@dataclass(frozen=True)
class Retries:
    """How often a question is asked in all, and how long the judge waits in between, in seconds."""

    attempts: int = 5
    backoff_s: float = 1.0
    max_wait_s: float = 60.0

    def wait_s(self, attempt: int, asked_s: float = 0.0) -> float:
        """Return the seconds until the next attempt: doubling, at least what the server asks, at most max_wait_s."""
        return min(max(self.backoff_s * 2 ** (attempt - 1), asked_s), self.max_wait_s)


@dataclass
class AskingJudge:
    """Asks a model to compare responses, retries what may pass, and remembers every reply.

    Args:
        ask: (question, seed) -> Reply; raises RateLimited or Unavailable (or TimeoutError, ConnectionError) for what
            may pass. The seed is the vote's number where there are several, else None.
        prompt: the words of a question.
        replies: the open file of replies, also of those that could not be used; an answered question is not asked
            again, a failed one is. None for a judge that is only planned.
        identity: what decides the replies besides question and vote: the model's name, sampling settings.
        votes: how often each question is asked; `verdicts.majority` decides.
        max_failure_rate: raise JudgeError as soon as more comparisons than this share have failed for good.
        workers: questions that are open at a time.
    """

    ask: Callable[[str, int | None], Reply]
    prompt: JudgePrompt
    replies: Replies | None
    identity: Mapping[str, Any]
    votes: int = 1
    retries: Retries = field(default_factory=Retries)
    max_failure_rate: float = 0.05
    workers: int = 4
    count: Count = uncounted

    @property
    def about(self) -> dict[str, Any]:
        return {**self.identity, "prompt_sha256": self.prompt.sha256, "votes": self.votes}

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """Judge every comparison in both orders; what the file of replies holds is not asked again.

        Raises JudgeError past the failure rate (every reply until then is kept), and at once whatever `ask` raises that
        will not pass, such as a wrong key.
        """
        assert self.replies is not None
        found: list[Judgement] = []
        failed, path = 0, self.replies.path
        stop = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for judgement in pool.map(partial(self._both_orders, stop=stop), comparisons):
                    found.append(judgement)
                    failed += judgement.outcome == "failed"
                    self.count(2 * judgement.asked)
                    check_failures(failed, len(found), len(comparisons), self.max_failure_rate, path)
            finally:
                stop.set()  # questions that wait in the pool are given up, not asked
        return found

    def keyed(self, comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
        """Key and text of every question, one for each vote."""
        asked = [
            question for each in comparisons if each.ours != each.theirs for question in self.prompt.questions(each)
        ]
        return [(self._key(question, vote), question) for question in asked for vote in range(self.votes)]

    def _key(self, question: str, vote: int) -> str:
        return key_of({**self.identity, "prompt_sha256": self.prompt.sha256}, question, vote)

    def _both_orders(self, comparison: Comparison, stop: threading.Event) -> Judgement:
        if comparison.ours == comparison.theirs:
            return equal(comparison)
        one, two = (self._order(question, stop) for question in self.prompt.questions(comparison))
        return Judgement(comparison, one, two)

    def _order(self, question: str, stop: threading.Event) -> Order:
        assert self.replies is not None
        keys = [self._key(question, vote) for vote in range(self.votes)]
        rows = [row for vote, key in enumerate(keys) if (row := self._vote(question, key, vote, stop)) is not None]
        tokens = [row["tokens"] for row in rows if row.get("tokens")]
        return Order(
            majority([row["verdict"] for row in rows] + [""] * (self.votes - len(rows))),
            tuple(row["key"] for row in rows),
            (sum(each[0] for each in tokens), sum(each[1] for each in tokens)) if tokens else None,
            sum(row.get("seconds", 0.0) for row in rows),
            sum(self.replies.unparsed(key) for key in keys),
            tuple(row["model"] for row in rows if row.get("model")),
        )

    def _vote(self, question: str, key: str, vote: int, stop: threading.Event) -> dict[str, Any] | None:
        """The row of the file that answers a question; None after the last attempt."""
        assert self.replies is not None
        for attempt in range(1, self.retries.attempts + 1):
            if stop.is_set() or self.replies.get(key) is not None:
                return self.replies.get(key)
            row: dict[str, Any] = {"key": key, "vote": vote, "attempt": attempt, "verdict": None}
            asked_s, began = 0.0, time.monotonic()
            try:
                row |= _written(self.ask(question, vote if self.votes > 1 else None))
            except RateLimited as error:
                row["error"] = str(error)
                asked_s = error.retry_after_s or 0.0
            except (Unavailable, TimeoutError, ConnectionError) as error:
                row["error"] = f"{type(error).__name__}: {error}"
            row["seconds"] = round(time.monotonic() - began, 3)
            self.replies.add(row)
            if row["verdict"]:
                return row
            if attempt < self.retries.attempts:
                stop.wait(self.retries.wait_s(attempt, asked_s))
        return None


def _written(reply: Reply) -> dict[str, Any]:
    counted = reply.tokens_in is not None and reply.tokens_out is not None
    return {
        "reply": reply.text,
        "verdict": parse(reply.text),
        "tokens": [reply.tokens_in, reply.tokens_out] if counted else None,
        "model": reply.model,
        "finish": reply.finish,
    }
