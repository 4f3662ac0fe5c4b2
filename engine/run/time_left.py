"""The time that a run has left: what its stages were planned to take, corrected by what stages like them took."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from macpo.engine.run.stages import Graph

STAGE_S = 0.3
"""Planned seconds of every stage beside its work: its files, their hashes, and the way between processes."""
BASIS = 0.03
"""Share of the planned work that has to be measured before anything is said."""
PRIOR = 0.5
"""How many stages of a group what is known of the wider group counts for."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a stage was planned to take.

    Attributes:
        seconds: on whatever machine; only their relation to those of other stages matters.
        like: groups of similar stages that it belongs to, the wider before the narrower.
    """

    seconds: float
    like: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A running stage.

    Attributes:
        elapsed: seconds since it began.
        left: seconds that its own counts say it has left; None where they say nothing.
        last: whether it is done when that work is done.
        seen: the part of its planned work that was measured, and the seconds which that took.
    """

    elapsed: float
    left: float | None = None
    last: bool = False
    seen: tuple[float, float] = (0.0, 0.0)


class TimeLeft:
    """Corrects a plan by what its stages take.

    The ratio of measured to planned seconds is that of all stages with work, corrected by those of each group the stage
    belongs to: the wider group's ratio counts as half a stage of the narrower one. Stages that only move files have a
    ratio of their own, because a machine that computes slowly does not do that more slowly by as much.

    Args:
        planned: by stage; where it is empty, the stages' own relative durations serve.
        jobs: how many stages run at once.
    """

    def __init__(self, graph: Graph, planned: Mapping[str, Planned] | None = None, jobs: int = 1) -> None:
        self._graph, self._jobs, self._urgency = graph, jobs, graph.urgency()
        self._planned = {
            stage.name: (planned or {}).get(stage.name) or Planned(stage.work.duration(), (stage.kind,))
            for stage in graph.stages
        }
        self._seen: dict[str, tuple[float, float]] = {}
        """Stage -> its planned seconds that were measured, and the measured ones."""

    def planned(self, name: str) -> float:
        """The stage's planned seconds."""
        return self._planned[name].seconds + STAGE_S

    def measured(self, name: str, seconds: float) -> None:
        """Note what a finished stage took."""
        self._seen[name] = (self.planned(name), seconds)

    def expected(self, names: Iterable[str], running: Mapping[str, UnderWay] | None = None) -> dict[str, float] | None:
        """Corrected seconds of stages, from their beginnings to their ends; None where there is no basis yet.

        The basis is a share of the planned work of these stages and those that were measured.
        """
        names = list(names)
        seen = self._seen | {name: each.seen for name, each in (running or {}).items() if each.seen[0] > 0}
        work = {name: self._planned[name].seconds for name in {*names, *self._seen, *(running or {})}}
        basis = sum(work[name] * planned / self.planned(name) for name, (planned, _) in seen.items())
        if not seen or basis < BASIS * sum(work.values()):
            return None
        groups: dict[str, list[float]] = {}
        for name, (planned, seconds) in seen.items():
            for group in self._groups(name):
                sums = groups.setdefault(group, [0.0, 0.0, 0.0])
                for i, value in enumerate((planned, seconds, 1.0)):
                    sums[i] += value
        return {name: self.planned(name) * _ratio(groups, self._groups(name)) for name in names}

    def _groups(self, name: str) -> tuple[str, ...]:
        planned = self._planned[name]
        return ("work" if planned.seconds > 0 else "files", *planned.like)

    def left(self, waiting: Iterable[str], running: Mapping[str, UnderWay]) -> float | None:
        """Seconds until all stages are done, those that wait taken by free jobs as the runner takes them."""
        waiting = list(waiting)
        expected = self.expected([*waiting, *running], running)
        if expected is None:
            return None
        ends = {name: stage_left(each, expected[name]) or 0.0 for name, each in running.items()}
        return self._makespan({name: expected[name] for name in waiting}, ends)

    def whole(self) -> float | None:
        """Seconds that the whole run would take from its start."""
        expected = self.expected(self._planned)
        return None if expected is None else self._makespan(expected, {})

    def _makespan(self, waiting: Mapping[str, float], running: Mapping[str, float]) -> float:
        """Seconds until all are done: list scheduling with the most urgent ready stage first, as in `Runner`."""
        unknown = {*waiting, *running}
        missing, readers = {}, {name: [] for name in unknown}  # type: dict[str, int], dict[str, list[str]]
        for name in waiting:
            inputs = {each for each in self._graph.stage(name).inputs.values() if each in unknown}
            missing[name] = len(inputs)
            for each in inputs:
                readers[each].append(name)
        ready = [self._order(name) for name, count in missing.items() if not count]
        heapq.heapify(ready)
        ends = [(seconds, name) for name, seconds in running.items()]
        heapq.heapify(ends)
        now = 0.0
        while ready or ends:
            while ready and len(ends) < self._jobs:
                name = heapq.heappop(ready)[-1]
                heapq.heappush(ends, (now + waiting[name], name))
            now, name = heapq.heappop(ends)
            for reader in readers[name]:
                missing[reader] -= 1
                if not missing[reader]:
                    heapq.heappush(ready, self._order(reader))
        return now

    def _order(self, name: str) -> tuple[float, int, str]:
        return -self._urgency[name], self._graph.number(name), name


def stage_left(stage: UnderWay, expected: float | None) -> float | None:
    """Seconds that a running stage has left; None where neither its counts nor the plan say anything."""
    if expected is None or expected <= stage.elapsed or (stage.last and stage.left is not None):
        return stage.left
    return max(stage.left or 0.0, expected - stage.elapsed)


def _ratio(groups: Mapping[str, list[float]], of: Sequence[str]) -> float:
    ratio = groups[of[0]][1] / groups[of[0]][0] if of[0] in groups else 1.0
    for group in of[1:]:
        if group in groups:
            planned, seconds, count = groups[group]
            prior = PRIOR * planned / count
            ratio = (seconds + prior * ratio) / (planned + prior)
    return ratio
