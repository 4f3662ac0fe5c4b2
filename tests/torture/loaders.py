"""Everything that reads a file which somebody else may have written: what good files it takes, and how it is called."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mutations
import pyarrow
import pyarrow.parquet
import torch
import yaml
from standalone_runs import make_base, recipe_of
from tiny import tiny

from macpo import recipe_kinds
from macpo.data.examples import load_examples
from macpo.data.preferences import load_preferences
from macpo.engine.config import LoraSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.distributed.world import World
from macpo.engine.generation import waves
from macpo.engine.model_folders import fingerprint_model, weight_files
from macpo.engine.models.loading import load_causal_lm, read_config, stored_dtype
from macpo.engine.models.tuning import adapter_rules, lora
from macpo.engine.planning.headers import inspect
from macpo.engine.run import folder as run_folder
from macpo.engine.run import lock
from macpo.engine.run.manifest import Manifest
from macpo.engine.training import checkpoint
from macpo.evaluation.claims import claims
from macpo.evaluation.summary import headline_metric
from macpo.report.findings import headline, table
from macpo.report.run_reader import RunReader


@dataclass(frozen=True, slots=True)
class Loader:
    """`make` fills a new folder with good files; `mutates` names those that are broken, and how.

    `load` gets the folder and the name of the file that was broken.
    """

    name: str
    make: Callable[[Path], None]
    mutates: Mapping[str, mutations.Mutator]
    load: Callable[[Path, str], object]

    def broken(self, good: Mapping[str, bytes], draw: random.Random) -> tuple[str, bytes]:
        """One of the files in another version: its name and content."""
        name = draw.choice(sorted(self.mutates))
        return name, self.mutates[name](good[name], draw, [good[other] for other in sorted(self.mutates)])


# --- rows ------------------------------------------------------------------------------------------------------------

_ROWS = {
    "pairs": {"prompt": "Why is the sky blue?", "chosen": "It scatters light.", "rejected": "No."},
    "chat": {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "Go."}],
    },
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    "pku": {
        "prompt": "Hi", "response_0": "Hello.", "response_1": "Go.", "better_response_id": 0, "safer_response_id": 1,
        "is_response_0_safe": True, "is_response_1_safe": False,
    },
    "ranked": {"instruction": "Sum", "input": "1 2", "output": ["3", "4"]},
}  # fmt: skip
_EXAMPLES = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "alpaca": {"instruction": "Sum", "input": "1 2", "output": "3"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
}


def _jsonl(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _write(content: Mapping[str, bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, raw in content.items():
            (folder / name).write_bytes(raw)

    return make


def _rows(name: str, row: Mapping[str, object], load: Callable[[Path], object]) -> list[Loader]:
    """The same rows as JSON Lines, a JSON list and a wrapped one, CSV and Parquet."""
    rows = [dict(row, n=str(number)) for number in range(3)]
    lists = {"d.json": json.dumps(rows).encode(), "e.json": json.dumps({"train": rows}).encode()}

    def read(folder: Path, file: str) -> object:
        return load(folder / file)

    def parquet(folder: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")

    found = [
        Loader(f"{name}-jsonl", _write({"d.jsonl": _jsonl(rows)}), {"d.jsonl": mutations.of_jsonl}, read),
        Loader(f"{name}-json", _write(lists), dict.fromkeys(lists, mutations.of_json), read),
        Loader(f"{name}-parquet", parquet, {"d.parquet": mutations.of_parquet}, read),
    ]
    if all(isinstance(value, str) for value in row.values()):
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in each.values()) for each in rows)]
        cells = {"d.csv": "\n".join(lines).encode()}
        found.append(Loader(f"{name}-csv", _write(cells), {"d.csv": mutations.of_bytes}, read))
    return found


# --- model folders ---------------------------------------------------------------------------------------------------


@functools.cache
def _base(folder: Path) -> Path:
    """A tiny model, made once beside the folders that are filled from it."""
    return make_base(folder / "base-model")


def _model(folder: Path) -> None:
    for path in _base(folder.parent).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def _sharded(folder: Path) -> None:
    model = load_causal_lm(_base(folder.parent))
    model.save_pretrained(folder, max_shard_size="30KB")


def _adapter(folder: Path) -> None:
    model = load_causal_lm(_base(folder.parent))
    lora.save_adapter(lora.new_adapter(model, LoraSettings(rank=2), seed=0), folder, base_name="base")


def _adapted(folder: Path, _: str) -> None:
    with torch.device("meta"):
        lora.check_adapter(inspect(_base(folder.parent)).model, folder)


def _adapter_config(folder: Path, _: str) -> None:
    adapter_rules.read_config(folder)


def _weights(folder: Path, _: str) -> None:
    weight_files(folder)
    stored_dtype(folder)
    fingerprint_model(folder)
    load_causal_lm(folder)


def _index(folder: Path, _: str) -> None:
    inspect(folder)
    stored_dtype(folder)


def _tokenizer(folder: Path, _: str) -> None:
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer, "vicuna")
    chat.prompt_ids([{"role": "user", "content": "the cat"}])


def _config(folder: Path, _: str) -> None:
    read_config(folder)
    inspect(folder)


# --- run folders -----------------------------------------------------------------------------------------------------

_STAGE = "01-data"


def _stage(folder: Path) -> None:
    stage = folder / _STAGE
    stage.mkdir()
    (stage / "rows.jsonl").write_bytes(_jsonl([{"id": 1}]))
    (stage / "timing.json").write_text('{"seconds": 1.5, "counts": {"tokens": 12, "dropped_long": 1}}')
    Manifest.of(stage, "data", "data", {"seed": 1, "path": "x"}, {"rows": "ab" * 32}).write(stage)


def _manifest(folder: Path, _: str) -> None:
    Manifest.read(folder / _STAGE).verify(folder / _STAGE, full=False)


def _checkpoint(folder: Path) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "m": torch.zeros(3)}
    checkpoint.save(folder, 3, tensors, {"epoch": 1, "seen": [1, 2]}, world=World())


def _latest(folder: Path, _: str) -> None:
    checkpoint.load_latest(folder, world=World(), like={"w": torch.zeros(2, 3), "m": torch.zeros(3)})


_RECORD = {
    "id": "a", "sample": 0, "attempt": 0, "token_ids": [1, 2], "end_token": 3, "text": "x", "sum_logp": -1.5,
    "end_logp": -0.5, "num_tokens": 2, "finish_reason": "stop", "empty": False,
}  # fmt: skip
_SUMMARY = {
    "agents": {
        "teacher0": {"role": "teacher", "scores": [{"iteration": 0, "gold": 0.5}, {"iteration": 1, "gold": 0.7}]},
        "student": {"role": "student", "scores": [{"iteration": 0, "gold": 0.6}, {"iteration": 1, "gold": 0.8}]},
        "ceiling": {"role": "ceiling", "scores": [{"iteration": 0, "gold": 0.9}]},
    },
    "stages": [{"name": "data", "seconds": 1.0, "tokens": 3}],
    "seed": 0,
    "versions": {"macpo": "0.1.0", "torch": "2.13.0"},
}


def _finished(folder: Path) -> None:
    """A run's folder as far as the report reads it."""
    _stage(folder)
    (folder / "summary.json").write_text(json.dumps(_SUMMARY))
    for name, files in {
        "02-eval-student-iter0": {
            "evaluation.json": b'{"role": "student", "iteration": 0, "gold": 0.6}',
            "evaluation.jsonl": _jsonl([{"prompt_id": "a", "prompt": "p", "response": "r", "gold": 0.6}]),
        },
        "03-student-train": {
            "metrics.jsonl": _jsonl([{"step": 1, "loss": 0.7, "lr": 0.1}, {"step": 2, "loss": 0.6, "lr": 0.1}]),
            "timing.jsonl": _jsonl([{"step": 1, "seconds": 0.1, "tokens_per_s": 5.0, "peak_memory_bytes": 9}]),
        },
    }.items():
        (folder / name).mkdir()
        for file, raw in files.items():
            (folder / name / file).write_bytes(raw)


def _timing(folder: Path, _: str) -> None:
    run_folder.read_timing(folder / _STAGE)
    reader = RunReader(folder)
    for stage in reader.stages:
        reader.timing(stage), reader.speed(stage)
    reader.counts()


def _summary(folder: Path, _: str) -> None:
    reader = RunReader(folder)
    table(reader.summary)
    headline(reader.summary, claims([reader.scored]) if headline_metric(reader.summary) else [])
    reader.curves(["student"])
    for evaluation in reader.evaluations:
        evaluation.metrics(), list(evaluation.rows())


def _recipe(recipe: recipe_kinds.AnyRecipe) -> bytes:
    """What a user writes: the settings that are not at their defaults."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump({**tree, "recipe": recipe.recipe, "output": "run"}, sort_keys=False).encode()


LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        Loader(
            "recipe",
            _write({
                "macpo.yaml": _recipe(tiny(Path("run"))),
                "dpo.yaml": _recipe(recipe_of("preference", None, Path("run"))),
                "sft.yaml": _recipe(recipe_of("sft", None, Path("run"))),
            }),
            dict.fromkeys(("macpo.yaml", "dpo.yaml", "sft.yaml"), mutations.of_yaml),
            lambda folder, file: recipe_kinds.load(folder / file),
        ),
        *(loader for name, row in _ROWS.items() for loader in _rows(name, row, load_preferences)),
        *(loader for name, row in _EXAMPLES.items() for loader in _rows(name, row, load_examples)),
        Loader("weights", _model, {"model.safetensors": mutations.of_safetensors}, _weights),
        Loader("weights-index", _sharded, {"model.safetensors.index.json": mutations.of_json}, _index),
        Loader("config", _model, {"config.json": mutations.of_json}, _config),
        Loader(
            "tokenizer", _model,
            dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), mutations.of_json), _tokenizer,
        ),
        Loader("adapter-config", _adapter, {"adapter_config.json": mutations.of_json}, _adapter_config),
        Loader(
            "adapter", _adapter,
            {"adapter_config.json": mutations.of_json, "adapter_model.safetensors": mutations.of_safetensors}, _adapted,
        ),
        Loader("manifest", _stage, {f"{_STAGE}/manifest.json": mutations.of_json}, _manifest),
        Loader(
            "checkpoint", _checkpoint,
            {
                "step-00000003/manifest.json": mutations.of_json, "step-00000003/state.json": mutations.of_json,
                "step-00000003/shard-00001-of-00001.safetensors": mutations.of_safetensors,
            },
            _latest,
        ),
        Loader(
            "lock", _write({lock.LOCK: json.dumps({"host": "h", "pid": 1, "started": "x"}).encode()}),
            {lock.LOCK: mutations.of_json}, lambda folder, _: lock.holder(folder),
        ),
        Loader(
            "timing", _finished,
            {
                f"{_STAGE}/timing.json": mutations.of_json, "03-student-train/timing.jsonl": mutations.of_jsonl,
            },
            _timing,
        ),
        Loader(
            "summary", _finished,
            {
                "summary.json": mutations.of_json, "03-student-train/metrics.jsonl": mutations.of_jsonl,
                "02-eval-student-iter0/evaluation.json": mutations.of_json,
                "02-eval-student-iter0/evaluation.jsonl": mutations.of_jsonl,
            },
            _summary,
        ),
        Loader(
            "wave", _write({"0000.jsonl": waves._encode([_RECORD] * 2, "d")}), {"0000.jsonl": mutations.of_jsonl},
            lambda folder, file: waves.read_wave(folder / file, "d"),
        ),
    )
}  # fmt: skip
