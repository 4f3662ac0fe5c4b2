"""The first stage of a run: disjoint sets of prompts, and who may read which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, field_serializer

from macpo import demo_world
from macpo.data.preferences import split
from macpo.data.prompts import Prompts, ids_of
from macpo.data_settings import DataSettings
from macpo.engine.data.records import Example, Pair, write_records
from macpo.engine.files import write_json
from macpo.engine.run.context import StageContext
from macpo.method.base_models import DOCUMENTS
from macpo.method.costs import MethodStage, RunSize
from macpo.method.data_sets import Documents, count_dropped, count_overlap, held_out_source, own_source, read_pairs


@dataclass(frozen=True, slots=True)
class Sources:
    """What the recipe's data holds, by who may read it."""

    teachers: dict[str, Sequence[Pair]]
    student: Sequence[Pair]
    test: Sequence[Pair]
    dev: Sequence[Pair]
    reward: Sequence[Pair]
    """For a reward model alone."""
    documents: dict[str, Sequence[Example]]
    """By role; the same for both where they are what the sets leave over."""
    counts: dict[str, int]


def read_sources(
    data: DataSettings, teachers: Mapping[str, str | None], seed: int, most: Mapping[str, int] | None = None
) -> Sources:
    """Build the demo world, or load and split a preference set.

    Args:
        teachers: name -> data of its own or None.
        most: how many prompts of its own data a teacher sees; those that are not named see all.
    """
    if data.world is not None:
        made = demo_world.build(data.world, seed, num_teachers=len(teachers))
        world = dict(zip(teachers, made.teachers, strict=True))
        return Sources(dict(world), made.student, made.test, made.dev, (), dict(made.documents), {})
    pairs, counts = read_pairs(data)
    held_out = None
    if (source := held_out_source(data)) is not None:
        held_out, dropped = read_pairs(data, source)
        count_dropped(counts, dropped, "test")
    judged = pairs if held_out is None else held_out
    parts = split(
        pairs,
        teacher=data.teacher_prompts,
        student=data.student_prompts,
        test=data.test_size(len(np.unique(judged.ids)), apart=held_out is not None),
        reward=data.reward_prompts,
        dev=data.dev_prompts,
        seed=seed,
        held_out=held_out,
    )
    if held_out is not None:
        counts["train_test_overlap_dropped"] = counts["prompts"] - len(Prompts(pairs, seed, without=parts.test.ids))
    reserved = ids_of([parts.student, parts.test, parts.dev, parts.reward])
    labels = dict.fromkeys(teachers, parts.teacher)
    for name, own in teachers.items():
        if own is not None:  # the teacher's own data must not overlap with prompts that are kept from it
            theirs, dropped = read_pairs(data, own_source(data, own))
            count_dropped(counts, dropped, name)
            labels[name] = theirs.take(np.flatnonzero(~np.isin(theirs.ids, reserved)))
            counts[f"{name}_overlap_dropped"] = len(theirs) - len(labels[name])
            if most and name in most:
                labels[name] = Prompts(labels[name], seed).every(0, most[name])
    training = [parts.student, parts.reward, *{id(part): part for part in labels.values()}.values()]
    count_overlap(counts, parts.test, training)
    by_role: dict[str, Sequence[Example]] = dict.fromkeys(("teacher", "student"), Documents(parts.rest))
    return Sources(dict(labels), parts.student, parts.test, parts.dev, parts.reward, by_role, counts)


class PromptSets(MethodStage):
    """A kind of stage that reads the recipe's data."""

    data: DataSettings
    teachers: dict[str, str | None]
    """Name -> data of its own."""
    most: dict[str, int] | None = None
    """Name -> how many prompts of these it sees, where not all."""
    files: dict[str, str]
    """Identity of each file or folder that is read."""
    seed: int
    pretrains: bool = Field(default=True, exclude=True)
    """Whether an agent is pretrained on what the sets leave over, which is written only then."""

    @field_serializer("data")
    def _key_of_data(self, data: DataSettings) -> dict[str, Any]:
        return data.key()

    def sources(self) -> Sources:
        return read_sources(self.data, self.teachers, self.seed, self.most)

    def disk_bytes(self, run: RunSize) -> float:
        pairs = sum(map(run.labels_of, self.teachers)) + run.test_prompts + run.dev_prompts + run.reward_prompts
        documents = run.documents * self.pretrains * (1 if self.data.world is None else 2)  # for teachers and student
        rows = run.row_bytes() * pairs + run.row_bytes(1) * documents
        return rows + run.row_bytes(0) * run.student_prompts


class SplitPrompts(PromptSets):
    """Write `teacher-NAME.jsonl`, `test.jsonl` and `dev.jsonl` with human responses, and `student.jsonl` with none."""

    name = "split_prompts"
    doing = "splits prompts"

    def run(self, ctx: StageContext) -> None:
        sources = self.sources()
        for name, pairs in sources.teachers.items():
            write_records(ctx.dir / f"teacher-{name}.jsonl", pairs)
        write_records(ctx.dir / "student.jsonl", [pair.prompt for pair in sources.student])
        write_records(ctx.dir / "test.jsonl", sources.test)
        if sources.reward:
            write_records(ctx.dir / "reward.jsonl", sources.reward)
        if sources.dev:
            write_records(ctx.dir / "dev.jsonl", sources.dev)
        if self.data.world is not None:
            for role, documents in sources.documents.items():
                write_records(ctx.dir / f"documents-{role}.jsonl", documents)
        elif self.pretrains:
            write_records(ctx.dir / DOCUMENTS, sources.documents["student"])
        sizes = {f"teacher-{name}": len(pairs) for name, pairs in sources.teachers.items()}
        sizes |= {"student": len(sources.student), "test": len(sources.test)}
        sizes |= {"reward": len(sources.reward)} if sources.reward else {}
        sizes |= {"dev": len(sources.dev)} if sources.dev else {}
        write_json(ctx.dir / "counts.json", {"rows": sizes, "input": sources.counts})


class HumanResponses(PromptSets):
    """The student half's human responses, for the ceiling alone; no training stage of MACPO reads this folder."""

    name = "human_answers"
    doing = "collects human responses"

    def run(self, ctx: StageContext) -> None:
        write_records(ctx.dir / "student.jsonl", self.sources().student)

    def disk_bytes(self, run: RunSize) -> float:
        return run.row_bytes() * run.student_prompts
