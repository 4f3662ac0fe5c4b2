"""Decides which request starts when: pure Python, a function of the set of requests alone.

Requests run longest prompt first (so that a batch's contexts are of similar length), ties by id. All samples of a
request start together, so its prompt is prefilled once; only a request with more samples than slots (or than the
block pool has room for) is split. A slot holds the worst case of any request of the run, and a request gets blocks for
its own worst case when it starts, so nothing that was admitted is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from macpo.engine.generation.request import Request


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one request that share a prefill."""

    request: Request
    samples: tuple[int, ...]


class Scheduler:
    """Starts groups as slots (and blocks of a pool) become free, at least an eighth of the slots at a time."""

    def __init__(
        self,
        requests: Sequence[Request],
        num_slots: int,
        num_blocks: int = 0,
        need: Callable[[Request], Need] = lambda _: Need(0, 0),
    ) -> None:
        """num_blocks: blocks of the whole pool, at least `need(request).blocks(1)` for every request."""
        self.num_slots = num_slots
        self._num_blocks = num_blocks
        self._need = need
        self._waiting: deque[Group] = deque(
            Group(request, request.samples[start : start + size])
            for request in sorted(requests, key=_rank)
            for size in [self._largest_group(request)]
            for start in range(0, len(request.samples), size)
        )
        self._num_waiting = sum(len(group.samples) for group in self._waiting)

    def need(self, group: Group) -> Need:
        return self._need(group.request)

    def ready(self, num_free: int, num_free_blocks: int = 0) -> bool:
        """Whether this many free slots and blocks are worth a refill; always where all slots are free."""
        if not self._waiting:
            return False
        chunk = min(max(1, self.num_slots // 8), self._num_waiting)
        chunk = max(chunk, len(self._waiting[0].samples))
        if num_free < chunk:
            return False
        blocks = sum(self._blocks(group) for group in self._first(chunk))
        return num_free == self.num_slots or blocks <= num_free_blocks

    def admit(self, num_free: int, num_free_blocks: int = 0) -> list[Group]:
        """Removes the groups that start now from the waiting ones and returns them."""
        groups: list[Group] = []
        if self.ready(num_free, num_free_blocks):
            for group in self._first(num_free):
                num_free_blocks -= self._blocks(group)
                if num_free_blocks < 0:
                    break
                groups.append(group)
            for group in groups:
                self._waiting.popleft()
                self._num_waiting -= len(group.samples)
        return groups

    def _first(self, num_samples: int) -> Iterator[Group]:
        """The next groups, of at most `num_samples` samples together."""
        for group in self._waiting:
            num_samples -= len(group.samples)
            if num_samples < 0:
                return
            yield group

    def _blocks(self, group: Group) -> int:
        return self.need(group).blocks(len(group.samples))

    def _largest_group(self, request: Request) -> int:
        need = self._need(request)
        return min(self.num_slots, (self._num_blocks - need.shared) // need.own) if need.own else self.num_slots


def _rank(request: Request) -> tuple[int, int, str, int, tuple[int, ...]]:
    return -len(request.prompt_ids), -request.params.max_new_tokens, request.id, request.attempt, request.samples


@dataclass(frozen=True, slots=True)
class Need:
    """Most blocks that a request needs: `shared` by its samples, and `own` for each sample."""

    shared: int
    own: int

    @classmethod
    def of(cls, prompt_tokens: int, num_tokens: int, block_tokens: int) -> Need:
        """Blocks for a prompt that grows to at most `num_tokens` tokens, more than it has."""
        shared = prompt_tokens // block_tokens
        return cls(shared, -(-num_tokens // block_tokens) - shared)

    def blocks(self, num_samples: int) -> int:
        """Blocks for `num_samples` samples together."""
        return self.shared + num_samples * self.own
