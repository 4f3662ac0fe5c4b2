"""Which request starts when: pure Python, a function of the set of requests alone.

Requests run longest prompt first (so that a batch's contexts are of similar length), ties by id. All samples of a
request start together, so its prompt is prefilled once; only a request with more samples than slots is cut.
A slot holds the worst case of any request of the run, so nothing that was admitted is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from macpo.engine.generation.request import Request


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one request that share a prefill; `index` is the request's place in the caller's list."""

    index: int
    request: Request
    samples: tuple[int, ...]


class Scheduler:
    """Hands out groups as slots fall free, at least an eighth of the slots at a time."""

    def __init__(self, requests: Sequence[Request], num_slots: int) -> None:
        self.num_slots = num_slots
        order = sorted(range(len(requests)), key=lambda i: _rank(requests[i]))
        self._waiting: deque[Group] = deque(
            Group(i, requests[i], requests[i].samples[start : start + num_slots])
            for i in order
            for start in range(0, len(requests[i].samples), num_slots)
        )
        self._num_waiting = sum(len(group.samples) for group in self._waiting)

    @property
    def num_waiting(self) -> int:
        """Samples that have not started."""
        return self._num_waiting

    def ready(self, num_free: int) -> bool:
        """Whether so many free slots are worth a refill."""
        if not self._waiting:
            return False
        chunk = min(max(1, self.num_slots // 8), self._num_waiting)
        return num_free >= max(chunk, len(self._waiting[0].samples))

    def admit(self, num_free: int) -> list[Group]:
        """The groups that start now."""
        groups: list[Group] = []
        if self.ready(num_free):
            while self._waiting and len(self._waiting[0].samples) <= num_free:
                groups.append(self._waiting.popleft())
                num_free -= len(groups[-1].samples)
                self._num_waiting -= len(groups[-1].samples)
        return groups


def _rank(request: Request) -> tuple[int, int, str, int, tuple[int, ...]]:
    return -len(request.prompt_ids), -request.params.max_new_tokens, request.id, request.attempt, request.samples
