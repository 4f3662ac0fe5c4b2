"""The whole method at toy sizes on the device, from base models to the report, once or twice.

    python -m bench.gpu.whole_loop [--runs 2] [--json-dir DIR]

Two teachers and a student of the demo world, one iteration, full tuning and LoRA, generation, scoring and DPO. Two runs
of one recipe must write the same weights, responses and scores, bit for bit; files that differ are named, and the exit
status is then 1. Models are as wide as the device's kernels need.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness.device import default_device, device_name, provenance
from macpo.commands.run import run
from macpo.config import Recipe

OPTIM = {"learning_rate": 3e-3, "batch": 8}
WIDTHS = {"cpu": (16, 24, 32), "cuda": (128, 192, 256)}  # two heads each: Triton's decode kernel takes heads of 64
# Times, logs and who wrote a file; all other files of a stage have to be equal.
UNHASHED = {"timing.json", "timing.jsonl", "stage.log", "manifest.json"}


def recipe(folder: Path, device: torch.device) -> Recipe:
    """Build the recipe; models are trained from scratch for a few steps."""

    def init(width: int, tokenizer: str = "word") -> dict[str, Any]:
        sizes = {"hidden_size": width, "num_layers": 1, "num_heads": 2, "context": 64}
        return {**sizes, "tokenizer": tokenizer, "vocab_size": 400, "pretrain": OPTIM | {"max_documents": 60}}

    world = {"teacher_documents": 80, "student_documents": 80, "teacher_pairs": 16, "teacher_prompts": 64}
    first, second, student = WIDTHS[device.type]
    adapter = {"type": "lora", "rank": 2, "target_modules": "all-linear"}
    training = {"positive": OPTIM, "negative": OPTIM, "preference": OPTIM | {"learning_rate": 1e-3}}
    return Recipe.model_validate(
        {
            "output": str(folder),
            "data": {"world": {**world, "student_prompts": 20, "test_prompts": 12}},
            "template": "vicuna",
            "context_tokens": 64,
            "iterations": 1,
            "teachers": [
                {"init": init(first), "tuning": {"type": "full"}},
                {"init": init(second, "bpe"), "tuning": adapter},
            ],
            "student": {"init": init(student), "tuning": {"type": "full"}},
            "teacher_training": training,
            "student_training": training,
            "sampling": {"max_new_tokens": 12},
            "compute": {"device": device.type, "wave_requests": 16, "generation_batch": 16},
        }
    )


def content(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of every file of a stage that two runs must share."""
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file() and path.name not in UNHASHED]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, choices=(1, 2), default=2)
    parser.add_argument("--json-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    device = default_device()
    print(f"whole loop: {device_name(device)}, torch {torch.__version__}", flush=True)
    body: dict[str, Any] = {"bench": "loop", **provenance(device), "seconds": []}
    written = []
    with TemporaryDirectory(prefix="macpo-loop-") as name:
        for number in range(args.runs):
            start, folder = time.perf_counter(), Path(name) / str(number)
            run(recipe(folder, device))
            body["seconds"].append(time.perf_counter() - start)
            written.append(content(folder))
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            body["student"] = [score.get("gold") for score in summary["agents"]["student"]["scores"]]
            body["files"] = len(written[0])
            body["differ"] = sorted(path for path, digest in written[0].items() if written[-1].get(path) != digest)
            (args.json_dir / "loop.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"{args.runs} runs, {body['files']} files, {len(body['differ'])} differ: {body['differ'][:20]}", flush=True)
    return 1 if body["differ"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
