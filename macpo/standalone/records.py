"""The data of a standalone recipe: what is trained on, and what is held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_serializer

from macpo import demo_world
from macpo.data.prompts import Prompts
from macpo.data.rows import Source
from macpo.data.spool import Records
from macpo.engine.data.records import Example, Pair, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import write_json
from macpo.engine.run.context import StageContext
from macpo.method.base_models import DOCUMENTS
from macpo.method.costs import MethodStage, RunSize
from macpo.method.data_sets import (
    Documents,
    count_dropped,
    count_overlap,
    held_out_source,
    judged_rows,
    read_examples,
    read_pairs,
    source_of,
)
from macpo.standalone.config import ExampleData, PairData


@dataclass(frozen=True, slots=True)
class Sets:
    """What the data holds: no prompt of `test` is in `train` or `documents`."""

    train: Sequence[Pair] | Sequence[Example]
    test: Sequence[Pair] | Sequence[Example]
    documents: Sequence[Example]
    """For a model that is pretrained here: what `train_prompts` leaves over."""
    counts: dict[str, int]


def read_sets(data: PairData | ExampleData, seed: int) -> Sets:
    """Build the demo world, or load a data set and hold prompts out of it.

    Raises DataError where too few prompts are left to train or to evaluate on.
    """
    if data.world is not None:
        made = demo_world.build(data.world, seed, num_teachers=1)
        side = "rejected" if data.format == "rejected" else "chosen"
        shown, tests = (_of_kind(pairs, data, side) for pairs in (made.student, made.test))
        return Sets(shown, tests, made.documents["student"], {})
    records, counts = _load(data)
    if (source := held_out_source(data)) is None:
        prompts = Prompts(records, seed)
        num_test = start = data.test_size(len(prompts), apart=False)
        held = prompts.first(0, num_test)
    else:
        held_records, dropped = _load(data, source)
        count_dropped(counts, dropped, "test")
        apart, start = Prompts(held_records, seed), 0
        num_test = data.test_size(len(apart), apart=True)
        held = apart.first(0, num_test)
        prompts = Prompts(records, seed, without=held.ids)
        counts["train_test_overlap_dropped"] = len(Prompts(records, seed)) - len(prompts)
    left = max(0, len(prompts) - start)
    if not left or not held or left < (data.train_prompts or 0):
        raise DataError(
            f"{left} distinct prompts are left to train on and {len(held)} to evaluate on",
            f"lower data.test_prompts ({num_test}) or data.train_prompts, or add data",
            field="data",
        )
    end = len(prompts) if data.train_prompts is None else start + data.train_prompts
    train = prompts.every(start, end)
    count_overlap(counts, held, [train])
    return Sets(train, held, Documents(prompts.every(end)), counts)


def _load(data: PairData | ExampleData, source: Source | None = None) -> tuple[Records[Any], dict[str, int]]:
    return read_pairs(data, source) if isinstance(data, PairData) else read_examples(data, source)


def sample_rows(data: PairData | ExampleData, count: int) -> tuple[Sequence[Pair | Example], int]:
    """Return the first rows, and how many there are by the size of the files; of the Hub's only those that are read.

    Raises as reading them does.
    """
    source = source_of(data, max_rows=count)
    rows, counts = _load(data, source)
    return rows, judged_rows(source, rows, counts)


def _of_kind(pairs: list[Pair], data: PairData | ExampleData, side: str) -> list[Pair] | list[Example]:
    return pairs if isinstance(data, PairData) else [pair.example(side) for pair in pairs]


class SplitRecords(MethodStage):
    """Write `train.jsonl` and `test.jsonl`, and the documents where the model is pretrained on them."""

    name = "split_records"
    doing = "reads and splits the data"
    data: PairData | ExampleData
    kind: Literal["sft", "preference", "reward"]
    files: dict[str, str]
    """Identity of each file or folder that is read."""
    seed: int
    pretrains: bool = Field(default=True, exclude=True)
    """Whether the model is pretrained on what `train_prompts` leaves over, which is written only then."""

    @field_serializer("data")
    def _key_of_data(self, data: PairData | ExampleData) -> dict[str, Any]:
        return data.key()

    def disk_bytes(self, run: RunSize) -> float:
        return run.row_bytes() * (run.student_prompts + run.test_prompts + self.pretrains * run.documents)

    def run(self, ctx: StageContext) -> None:
        sets = read_sets(self.data, self.seed)
        write_records(ctx.dir / "train.jsonl", sets.train)
        write_records(ctx.dir / "test.jsonl", sets.test)
        if self.data.world is not None:
            write_records(ctx.dir / "documents-student.jsonl", sets.documents)
        elif self.pretrains:
            write_records(ctx.dir / DOCUMENTS, sets.documents)
        rows = {"train": len(sets.train), "test": len(sets.test)}
        write_json(ctx.dir / "counts.json", {"rows": rows, "input": sets.counts})
