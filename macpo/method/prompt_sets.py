"""The first stages of a run: the disjoint sets of prompts, and base models made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from macpo import demo_world
from macpo.config import DataSettings
from macpo.data.preferences import load_preferences, split
from macpo.data.rows import Source
from macpo.engine.data.records import Example, Pair, write_records
from macpo.engine.files import write_json
from macpo.engine.run.context import StageContext


@dataclass(frozen=True, slots=True)
class Sources:
    """What the recipe's data holds, by who may read it."""

    teachers: dict[str, list[Pair]]
    student: list[Pair]
    test: list[Pair]
    documents: dict[str, list[Example]]
    counts: dict[str, int]


def read_sources(settings: dict[str, Any], teachers: dict[str, str | None], seed: int) -> Sources:
    """Build the demo world, or load and split a preference set; `teachers`: name -> data of its own or None."""
    data = DataSettings.model_validate(settings)
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
    documents = [Example(p.prompt, text) for p in parts.rest for text in (p.chosen, p.rejected)]
    return Sources(labels, parts.student, parts.test, {"teacher": documents, "student": documents}, counts)


def split_prompts(ctx: StageContext) -> None:
    """Write `teacher-NAME.jsonl` and `test.jsonl` with human answers, and `student.jsonl` with none."""
    s = ctx.settings
    sources = read_sources(s["data"], s["teachers"], s["seed"])
    for name, pairs in sources.teachers.items():
        write_records(ctx.dir / f"teacher-{name}.jsonl", pairs)
    write_records(ctx.dir / "student.jsonl", [pair.prompt for pair in sources.student])
    write_records(ctx.dir / "test.jsonl", sources.test)
    for role, documents in sources.documents.items():
        write_records(ctx.dir / f"documents-{role}.jsonl", documents)
    sizes = {f"teacher-{name}": len(pairs) for name, pairs in sources.teachers.items()}
    sizes |= {"student": len(sources.student), "test": len(sources.test)}
    write_json(ctx.dir / "counts.json", {"rows": sizes, "input": sources.counts})


def human_answers(ctx: StageContext) -> None:
    """The student half's human answers, for the ceiling alone; no training stage of MACPO reads this folder."""
    s = ctx.settings
    write_records(ctx.dir / "student.jsonl", read_sources(s["data"], s["teachers"], s["seed"]).student)
