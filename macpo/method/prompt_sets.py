"""The first stage of a run: three disjoint sets of prompts, and who may read which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import field_serializer

from macpo import demo_world
from macpo.config import DataSettings
from macpo.data.preferences import load_preferences, split
from macpo.data.rows import Source
from macpo.engine.data.records import Example, Pair, write_records
from macpo.engine.files import write_json
from macpo.engine.run.context import StageContext
from macpo.method.costs import MethodStage, RunSize


@dataclass(frozen=True, slots=True)
class Sources:
    """What the recipe's data holds, by who may read it."""

    teachers: dict[str, list[Pair]]
    student: list[Pair]
    test: list[Pair]
    documents: dict[str, list[Example]]
    counts: dict[str, int]


def read_sources(data: DataSettings, teachers: Mapping[str, str | None], seed: int) -> Sources:
    """Build the demo world, or load and split a preference set; `teachers`: name -> data of its own or None."""
    if data.world is not None:
        made = demo_world.build(data.world, seed, num_teachers=len(teachers))
        labels = dict(zip(teachers, made.teachers, strict=True))
        return Sources(labels, made.student, made.test, made.documents, {})
    assert data.path is not None
    source = Source(data.path, data.split, data.subset, data.columns)
    pairs, counts = load_preferences(source, format=data.format, preference=data.preference)
    parts = split(pairs, teacher=data.teacher_prompts, student=data.student_prompts, test=data.test_prompts, seed=seed)
    reserved = {pair.prompt.id for pair in (*parts.student, *parts.test)}
    labels = dict.fromkeys(teachers, parts.teacher)
    for name, own in teachers.items():
        if own is not None:  # the teacher's own data must not overlap with prompts that are kept from it
            theirs, _ = load_preferences(own)
            labels[name] = [pair for pair in theirs if pair.prompt.id not in reserved]
            counts[f"{name}_overlap_dropped"] = len(theirs) - len(labels[name])
    documents = [pair.example(side) for pair in parts.rest for side in ("chosen", "rejected")]
    return Sources(labels, parts.student, parts.test, {"teacher": documents, "student": documents}, counts)


class PromptSets(MethodStage):
    """A kind of stage that reads the recipe's data."""

    data: DataSettings
    teachers: dict[str, str | None]
    """Name -> data of its own."""
    files: dict[str, str]
    """Identity of each file or folder that is read."""
    seed: int

    @field_serializer("data")
    def _key_of_data(self, data: DataSettings) -> dict[str, Any]:
        """How prompts become tokens does not change which prompts there are."""
        return data.model_dump(mode="json", exclude={"long_prompt", "special_text"})

    def sources(self) -> Sources:
        return read_sources(self.data, self.teachers, self.seed)

    def disk_bytes(self, run: RunSize) -> float:
        rows = run.teacher_prompts * run.num_teachers + run.student_prompts + run.test_prompts
        return run.row_bytes * rows


class SplitPrompts(PromptSets):
    """Write `teacher-NAME.jsonl` and `test.jsonl` with human responses, and `student.jsonl` with none."""

    name = "split_prompts"

    def run(self, ctx: StageContext) -> None:
        sources = self.sources()
        for name, pairs in sources.teachers.items():
            write_records(ctx.dir / f"teacher-{name}.jsonl", pairs)
        write_records(ctx.dir / "student.jsonl", [pair.prompt for pair in sources.student])
        write_records(ctx.dir / "test.jsonl", sources.test)
        for role, documents in sources.documents.items():
            write_records(ctx.dir / f"documents-{role}.jsonl", documents)
        sizes = {f"teacher-{name}": len(pairs) for name, pairs in sources.teachers.items()}
        sizes |= {"student": len(sources.student), "test": len(sources.test)}
        write_json(ctx.dir / "counts.json", {"rows": sizes, "input": sources.counts})


class HumanAnswers(PromptSets):
    """The student half's human responses, for the ceiling alone; no training stage of MACPO reads this folder."""

    name = "human_answers"

    def run(self, ctx: StageContext) -> None:
        write_records(ctx.dir / "student.jsonl", self.sources().student)
