"""Rows per second and memory of reading, splitting and writing preference rows, and of `macpo check` on all of them.

    python -m bench.bench_loader [--rows 200000] [--file ROWS.jsonl] [--check] [--json-dir DIR]

Makes a JSON Lines file of about 1.2 kB a row, a quarter of the rows with a dialogue as prompt, in a temporary folder,
or reads the file that is named. Speed counts the process' own time; memory is what the resident size grows by at most.
Writes bench/results/<device>/loader.json, or into the folder that is named.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.harness import memory
from bench.harness.measure import save
from macpo.commands.check import check
from macpo.data.preferences import load_preferences, split
from macpo.engine.data.records import write_records
from macpo.standalone.config import PreferenceRecipe

WORDS = [f"word{i}" for i in range(2000)]


def write_rows(path: Path, num_rows: int, seed: int = 0) -> None:
    """Write pairs of random words."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            text = " ".join(draw.choices(WORDS, k=140))
            prompt: Any = f"question {number} {text[:300]}"
            if number % 4 == 0:
                turns = (f"question {number} {text[:150]}", text[150:300], "and then?")
                prompt = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            file.write(json.dumps({"prompt": prompt, "chosen": text[300:620], "rejected": text[620:]}) + "\n")


def measured(label: str, run: Callable[[], int]) -> dict[str, Any]:
    """Run once; print and return the speed, for the number of rows that the run returns, and the memory."""
    took: list[float] = []
    rows: list[int] = []

    def call() -> Mapping[str, torch.Tensor]:
        began = time.process_time()
        rows.append(run())
        took.append(time.process_time() - began)
        return {}

    extra = memory.measure(call, torch.device("cpu"), traced=False).extra
    speed = rows[0] / max(took[0], 1e-9)
    print(f"{label:24} {rows[0]:9,} rows {speed:10,.0f} rows/s {extra / 2**20:8,.0f} MiB")
    return {"name": label, "rows": rows[0], "rows_per_s": speed, "extra_bytes": extra}


def load_split_write(path: Path, out: Path) -> int:
    """Read all pairs, split them, and write the three sets."""
    pairs, counts = load_preferences(path)
    num = counts["prompts"]
    sets = split(pairs, teacher=num // 4, student=num // 4, test=num // 10, seed=0)
    for name in ("teacher", "student", "test"):
        write_records(out / f"{name}.jsonl", getattr(sets, name))
    return counts["rows"]


def check_all(path: Path, out: Path, num_rows: int) -> int:
    """`macpo check` with a word-level tokenizer."""
    corpus = out / "corpus.txt"
    corpus.write_text("\n".join(" ".join(WORDS[i : i + 100]) for i in range(0, len(WORDS), 100)))
    init = {"tokenizer": "word", "vocab_size": 3000, "corpus": str(corpus), "context": 512}
    data = {"path": str(path), "test_prompts": max(1, num_rows // 10)}
    recipe = PreferenceRecipe.model_validate(
        {"data": data, "init": init, "template": "vicuna", "context_tokens": 512, "output": str(out / "run")}
    )
    for _ in check(recipe):
        pass
    return num_rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--file", type=Path, help="rows that are there already")
    parser.add_argument("--check", action="store_true", help="also `macpo check`, which encodes every row")
    parser.add_argument("--json-dir", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="macpo-bench-") as folder:
        path = given.file or Path(folder) / "rows.jsonl"
        if given.file is None:
            write_rows(path, given.rows)
        print(f"{path.stat().st_size / 2**20:,.0f} MiB of JSON Lines; the memory is beyond the interpreter's")
        cases = [measured("load, split, write", lambda: load_split_write(path, Path(folder)))]
        if given.check:
            cases.append(measured("check", lambda: check_all(path, Path(folder), given.rows)))
    save("loader", cases, [], torch.device("cpu"), given.json_dir)


if __name__ == "__main__":
    main()
