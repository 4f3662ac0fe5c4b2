"""Predicted against measured step times on this machine, after one calibration step; or memory, by size of a forward.

    python -m bench.bench_plan [--device cpu|cuda] [--shapes small|issue|gpu] [--repeats 7] [--json-dir DIR]
    python -m bench.bench_plan --model FOLDER [--forwards 256,512,1024,2048,8192] [--repeats 3] [--json-dir DIR]

One calibration step of one model scales the machine; then whole steps of other shapes, families, tunings, batches and
lengths are predicted and measured. On a CPU one thread works and its own time counts, so that other work on the machine
changes little.

With a folder: DPO steps of 16 pairs by LoRA on a model of that shape on the CPU, with so many tokens in a forward,
each in a process of its own, whose peak resident memory stands beside the plan's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from bench.harness.device import default_device, provenance
from bench.harness.options import default_shapes
from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings
from macpo.engine.data.pack import pack
from macpo.engine.planning.calibrate import calibrate, measure, pairs, row_of, this_machine
from macpo.engine.planning.memory import Setup, memory
from macpo.engine.planning.step_time import Machine
from macpo.engine.processes import return_memory
from macpo.engine.training.throughput import peak_memory

FULL = FullSettings()
LORA = LoraSettings(rank=8, target_modules="all-linear")
LIMIT = 0.25
BATCH = (16, 90, 40)
"""Pairs of a step, mean tokens of a prompt and of a response, of --model."""


@dataclass(frozen=True)
class Case:
    """One shape with one batch."""

    kind: str
    layers: int
    hidden: int
    vocab: int
    tuning: LoraSettings | FullSettings
    batch: tuple[int, int, int]
    """Pairs, mean prompt, mean response."""
    parallel: ParallelSettings = ParallelSettings()  # noqa: RUF009 - frozen

    @property
    def config(self) -> PretrainedConfig:
        heads = self.hidden // (128 if self.hidden >= 1024 else 32)
        grouped: dict[str, Any] = {} if self.kind == "gpt_neox" else {"num_key_value_heads": max(1, heads // 4)}
        return AutoConfig.for_model(
            self.kind,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            intermediate_size=3 * self.hidden,
            max_position_embeddings=4096,
            pad_token_id=0,
            **grouped,
        )

    @property
    def name(self) -> str:
        tuning = "full" if self.tuning is FULL else "lora"
        checkpointing = "" if self.parallel.checkpointing == "off" else f", {self.parallel.checkpointing} checkpointing"
        return f"{self.kind} {self.layers}x{self.hidden}, vocab {self.vocab}, {tuning}{checkpointing}, {self.batch}"


CHECKPOINTED = ParallelSettings(checkpointing="full")
CASES = {
    "small": (Case("llama", 2, 64, 512, LORA, (2, 20, 10)),),  # end to end; too small to be judged
    "issue": (
        Case("llama", 2, 128, 8192, FULL, (8, 100, 40)),
        Case("llama", 4, 256, 8192, LORA, (16, 120, 50)),
        Case("llama", 6, 384, 8192, FULL, (8, 100, 40)),
        Case("llama", 6, 384, 8192, LORA, (4, 200, 30)),
        Case("llama", 4, 512, 32000, FULL, (4, 100, 40)),
        Case("llama", 8, 256, 8192, FULL, (8, 100, 40), CHECKPOINTED),
        Case("gpt_neox", 4, 256, 8192, FULL, (8, 100, 40)),
        Case("qwen2", 4, 256, 16384, LORA, (8, 200, 80)),
    ),
    "gpu": (
        Case("llama", 16, 2048, 128256, FULL, (16, 200, 80)),
        Case("llama", 16, 2048, 128256, LORA, (16, 200, 80)),
        Case("llama", 8, 4096, 128256, LORA, (16, 200, 80)),
        Case("llama", 8, 4096, 128256, LORA, (16, 200, 80), CHECKPOINTED),
        Case("qwen2", 14, 3584, 152064, LORA, (32, 113, 44)),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where a prediction is more than 25% off."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    parser.add_argument("--shapes", choices=CASES, help="default: gpu on a GPU, else issue")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", metavar="FOLDER", help="memory by size of a forward, for a model of this shape")
    parser.add_argument("--forwards", default="256,512,1024,2048,8192", metavar="TOKENS,...", help="with --model")
    parser.add_argument("--json-dir", type=Path, help="write plan.json there, or plan-memory.json")
    arguments = parser.parse_args(argv)
    if arguments.model:
        return by_forward(arguments.model, [int(n) for n in arguments.forwards.split(",")], arguments)
    shapes = arguments.shapes or default_shapes(torch.device(arguments.device))
    clock = time.perf_counter if arguments.device == "cuda" else time.process_time
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    base = Setup(FULL, dtype=dtype, device=arguments.device)
    machine: Machine = calibrate(base, this_machine(arguments.device), repeats=arguments.repeats, clock=clock)
    print(f"{machine.name}, calibrated by {machine.scale:.2f}; pairs, mean prompt and response tokens in brackets")
    rows: list[dict[str, Any]] = []
    for case in CASES[shapes]:
        setup = Setup(case.tuning, case.parallel, dtype, arguments.device)
        groups = pairs(*case.batch, case.vocab, seed=1)
        found = measure(case.config, setup, machine, groups, repeats=arguments.repeats, clock=clock)
        error = found.predicted / found.seconds - 1
        rows.append({"name": case.name, "seconds": found.seconds, "predicted_s": found.predicted, "error": error})
        print(f"{case.name:72} measured {found.seconds:7.3f} s  predicted {found.predicted:7.3f} s  {error:+5.0%}")
        if arguments.json_dir:
            body = {
                "bench": "plan",
                **provenance(torch.device(arguments.device)),
                "scale": machine.scale,
                "cases": rows,
            }
            (arguments.json_dir / "plan.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    worst = max(abs(row["error"]) for row in rows)
    print(f"worst {worst:.0%}")
    return int(worst > LIMIT and shapes != "small")


def by_forward(model: str, forwards: Sequence[int], arguments: argparse.Namespace) -> int:
    """Print the table of --model; return 1 where a peak is more than 25% off."""
    rows: list[dict[str, Any]] = []
    for tokens in forwards:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            row = fresh.apply(forward_of, (model, tokens, arguments.repeats))
        rows.append(row)
        print(
            f"{tokens:6} tokens a forward: {row['seconds']:6.2f} s a step, peak {row['peak_bytes'] / 1e9:5.2f} GB, "
            f"predicted {row['predicted_bytes'] / 1e9:5.2f} GB  {row['predicted_bytes'] / row['peak_bytes'] - 1:+5.0%}"
        )
        if arguments.json_dir:
            about = {"bench": "plan-memory", **provenance(torch.device("cpu")), "model": Path(model).name}
            text = json.dumps(about | {"pairs": BATCH, "cases": rows}, indent=1)
            (arguments.json_dir / "plan-memory.json").write_text(text + "\n", encoding="utf-8")
    return int(any(abs(row["predicted_bytes"] / row["peak_bytes"] - 1) > LIMIT for row in rows))


def forward_of(model: str, tokens: int, repeats: int) -> dict[str, Any]:
    """One row: CPU seconds of one thread, and the peak resident bytes of this process."""
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(model).get_text_config()
    setup = Setup(LORA, dtype=torch.float32, device="cpu")
    groups = pairs(*BATCH, config.vocab_size, seed=1)
    batches = pack(groups, max_tokens=tokens)
    needed = memory(config, setup, row_of(groups, batches[0].groups), len(batches))
    return_memory()  # what the dry run left
    machine = this_machine("cpu", 1)
    found = measure(config, setup, machine, groups, max_tokens=tokens, repeats=repeats, clock=time.process_time)
    return {
        "tokens": tokens,
        "forwards": len(batches),
        "seconds": found.seconds,
        "peak_bytes": peak_memory(torch.device("cpu")),
        "predicted_bytes": needed.device,
    }


if __name__ == "__main__":
    raise SystemExit(main())
