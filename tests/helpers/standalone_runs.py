"""Standalone recipes that run in a second, what a finished run holds, and runs that were finished long ago."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

from macpo import demo_world
from macpo.engine.config import InitSettings, PreferenceSettings
from macpo.engine.models.from_scratch import build_model, save_base, train_tokenizer
from macpo.recipe_kinds import KINDS
from macpo.standalone.config import Standalone

DPO = PreferenceSettings(learning_rate=1e-3, batch=16, sft_weight=0.0)


def recipe_of(kind: str, base: Path | None, output: Path, **changes: Any) -> Standalone:
    """A recipe that runs in a second, on a folder model or (base None) one made on the spot."""
    tree: dict[str, Any] = {
        "recipe": kind,
        "output": str(output),
        "data": {"world": WORLD},
        "context_tokens": 64,
        "training": OPTIM,
        "compute": COMPUTE,
        "template": "vicuna",
    }
    tree |= {"init": INIT} if base is None else {"model": str(base)}
    made = KINDS[kind].model_validate(tree | changes)
    assert made.recipe != "macpo"
    return made


def make_base(folder: Path, **changes: Any) -> Path:
    """A tiny model folder with a tokenizer of the world's words; its weights are random. `changes`: to its `init`."""
    documents = demo_world.build(demo_world.WorldSettings(**WORLD), 0, num_teachers=1).documents["student"]
    init = InitSettings.model_validate(INIT | changes)
    tokenizer = train_tokenizer(documents, init)
    save_base(build_model(init, tokenizer, seed=0), tokenizer, folder)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Path without the stage's number -> SHA-256, of every weight file, JSONL, score and setting of a stage."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and len(relative.parts) > 1 and path.name not in UNHASHED:
            found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def unpack_runs(folder: Path) -> Path:
    """Three small finished runs at `runs/KIND` below a folder, as their recipes say; returns `runs`.

    tests/engine/run/test_finished_runs.py describes them.
    """
    with tarfile.open(Path(__file__).parents[1] / "data" / "finished-runs.tar.xz") as archive:
        archive.extractall(folder / "runs", filter="data")
    return folder / "runs"


WORLD = {
    "teacher_documents": 1,
    "student_documents": 120,
    "teacher_pairs": 1,
    "teacher_prompts": 1,
    "student_prompts": 32,
    "test_prompts": 12,
}


COMPUTE = {"device": "cpu", "dtype": "float32", "threads": 1}


INIT = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "context": 64, "tokenizer": "word", "vocab_size": 400}


OPTIM = {"learning_rate": 1e-3, "batch": 8}


UNHASHED = {"timing.json", "timing.jsonl", "stage.log", "manifest.json"}  # a manifest notes who wrote it
