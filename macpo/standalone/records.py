"""The data of a standalone recipe: what is trained on, and what is held out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_serializer

from macpo import demo_world
from macpo.data.examples import load_examples
from macpo.data.preferences import load_preferences, shuffled_prompts
from macpo.data.rows import Source
from macpo.engine.data.records import Example, Pair, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import write_json
from macpo.engine.run.context import StageContext
from macpo.method.costs import MethodStage, RunSize
from macpo.standalone.config import ExampleData, PairData

Records = list[Pair] | list[Example]


@dataclass(frozen=True, slots=True)
class Sets:
    """What the data holds: no prompt of `test` is in `train` or `documents`."""

    train: Records
    test: Records
    documents: list[Example]
    """For a model that is pretrained here: what `train_prompts` leaves over."""
    counts: dict[str, int]


def read_sets(data: PairData | ExampleData, seed: int) -> Sets:
    """Build the demo world, or load a data set and hold prompts out of it.

    Raises DataError where too few prompts are left to train or to evaluate on.
    """
    if data.world is not None:
        made = demo_world.build(data.world, seed, num_teachers=1)
        side = "rejected" if data.format == "rejected" else "chosen"
        train, test = (_of_kind(pairs, data, side) for pairs in (made.student, made.test))
        return Sets(train, test, made.documents["student"], {})
    records, counts = _load(data, data.path, data.split)
    if data.test_path is None and data.test_split is None:
        prompts = shuffled_prompts(records, seed)
        held, left = prompts[: data.test_prompts], prompts[data.test_prompts :]
    else:
        held_records, _ = _load(data, data.test_path or data.path, data.test_split or data.split)
        held = shuffled_prompts(held_records, seed)[: data.test_prompts]
        reserved = {group[0].prompt.id for group in held}
        prompts = shuffled_prompts(records, seed)
        left = [group for group in prompts if group[0].prompt.id not in reserved]
        counts["train_test_overlap_dropped"] = len(prompts) - len(left)
    if not left or not held or len(left) < (data.train_prompts or 0):
        raise DataError(
            f"{len(left)} distinct prompts are left to train on and {len(held)} to evaluate on",
            "lower test_prompts or train_prompts, or add data",
            field="data",
        )
    used, rest = left[: data.train_prompts], left[len(left) if data.train_prompts is None else data.train_prompts :]
    documents = [document for group in rest for record in group for document in _documents(record)]
    return Sets([r for group in used for r in group], [group[0] for group in held], documents, counts)


def _load(data: PairData | ExampleData, path: str | None, split: str) -> tuple[list[Any], dict[str, int]]:
    assert path is not None
    load: Any = load_preferences if isinstance(data, PairData) else load_examples
    source = Source(path, split, data.subset, data.columns)
    found: tuple[list[Any], dict[str, int]] = load(source, format=data.format, preference=data.preference)
    return found


def _of_kind(pairs: list[Pair], data: PairData | ExampleData, side: str) -> Records:
    return pairs if isinstance(data, PairData) else [pair.example(side) for pair in pairs]


def _documents(record: Pair | Example) -> list[Example]:
    if isinstance(record, Example):
        return [record]
    return [record.example("chosen"), record.example("rejected")]


class SplitRecords(MethodStage):
    """Write `train.jsonl`, `test.jsonl` and `documents-student.jsonl`."""

    name = "split_records"
    data: PairData | ExampleData
    kind: Literal["sft", "preference"]
    files: dict[str, str]
    """Identity of each file or folder that is read."""
    seed: int

    @field_serializer("data")
    def _key_of_data(self, data: PairData | ExampleData) -> dict[str, Any]:
        """How prompts become tokens does not change which prompts there are."""
        return data.model_dump(mode="json", exclude={"long_prompt", "special_text"})

    def disk_bytes(self, run: RunSize) -> float:
        return run.row_bytes * (run.student_prompts + run.test_prompts + run.documents)

    def run(self, ctx: StageContext) -> None:
        sets = read_sets(self.data, self.seed)
        write_records(ctx.dir / "train.jsonl", sets.train)
        write_records(ctx.dir / "test.jsonl", sets.test)
        write_records(ctx.dir / "documents-student.jsonl", sets.documents)
        rows = {"train": len(sets.train), "test": len(sets.test)}
        write_json(ctx.dir / "counts.json", {"rows": rows, "input": sets.counts})
