"""The run that is tortured: a tiny one of the whole method (K = 2 teachers, T = 1), and the states on its way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from shim import Call
from states import State, differences, remove, replace, show, state_of
from tiny import tiny
from zygote import Ended, Orders, Zygote

from macpo.recipe_kinds import load, plan_of


class Faulty(Exception):
    """A run that nobody disturbed does not end as it should."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The way from one stage's commit to the next: the folder before and after it, and every call in between.

    `first`: number of the call with which the stage itself begins; before it a command starts up.
    """

    stage: str
    until: str
    before: Path
    after: Path
    calls: list[Call]
    first: int


class Run:
    """One recipe in one place, its uninterrupted result, and the segments that lead to the same result."""

    def __init__(self, zygote: Zygote, jobs: int = 1) -> None:
        self.zygote, self.folder = zygote, zygote.watched
        self.recipe = zygote.scratch / "recipe.yaml"
        made = tiny(self.folder, iterations=1)
        made = made.model_copy(update={"compute": made.compute.model_copy(update={"jobs": jobs})})
        self.recipe.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
        self.words = ("run", self.recipe)
        self.stages = [stage.name for stage in plan_of(load(self.recipe, []), must_exist=False).graph.stages]
        self.clean = zygote.scratch / "clean"
        self.wanted: State = {}

    def make_clean(self) -> Ended:
        """Run it to its end without any disturbance, twice: what it imports is imported here before the second time."""
        for warm in (False, True):
            remove(self.folder)
            ended = self._must(self.zygote.macpo(self.words, Orders(logs=True)), 0)
            if not warm:
                self.zygote.warm()
        replace(self.clean, self.folder)
        self.wanted = state_of(self.clean)
        return ended

    def segments(self, num_stages: int | None = None) -> list[Segment]:
        """Go from stage to stage, stopped after each; the end has to be that of the uninterrupted run.

        `num_stages`: stop for good after so many.
        """
        before = self.zygote.scratch / "states" / "000"
        remove(self.folder)
        found = []
        last = len(self.stages)
        for number, stage in enumerate([*self.stages, "finished"][:num_stages], 1):
            until = stage if number < last else ""
            ended = self._must(self.zygote.macpo(self.words, Orders(until=until, logs=True)), 75 if until else 0)
            self.zygote.warm("check", self.recipe)
            after = before.parent / f"{number:03d}"
            replace(after, self.folder)
            begins = [call.number for call in ended.calls if call.name == "mkdir" and call.path.endswith(".tmp")]
            found.append(Segment(stage, until, before, after, ended.calls, begins[0] if begins else 1))
            before = after
        if num_stages is None and (lines := differences(self.wanted, state_of(self.folder))):
            raise Faulty(f"stopped after every stage, the run ends in another state: {show(lines)}")
        return found

    def _must(self, ended: Ended, code: int) -> Ended:
        if ended.code != code:
            raise Faulty(f"exit code {ended.code} instead of {code}: {ended.printed[-2000:]}")
        return ended


def same_calls(run: list[Call], segments: list[Segment]) -> str:
    """Why the segments' calls, without their start-ups and stops, are not the uninterrupted run's; empty if they are.

    The numbers of processes and the random names of libraries do not count.
    """
    wanted = [_normal(call) for call in run]
    found = iter(wanted)
    for segment in segments[:-1]:
        for call in segment.calls[segment.first - 1 :]:
            if call.path.endswith("/.lock") and segment.until:
                continue
            if (line := _normal(call)) not in found:  # the iterator goes on behind it
                return f"{line} of {segment.stage} is not among the calls of the uninterrupted run"
    return ""


def _normal(call: Call) -> str:
    path = re.sub(r"\.\d+\.part$", ".N.part", call.path)
    return f"{call.name} {re.sub(r'[.]tmp[A-Za-z0-9]{6}$', '.tmpX', path)}"
