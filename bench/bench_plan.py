"""Predicted against measured step times on this machine, after one calibration step.

    python -m bench.bench_plan [--device cpu|cuda] [--shapes small|issue|gpu] [--repeats 7] [--json-dir DIR]

One calibration step of one model scales the machine; then whole steps of other shapes, families, tunings, batches and
lengths are predicted and measured. On a CPU one thread works and its own time counts, so that other work on the machine
changes little.
"""

from __future__ import annotations

import argparse
import json
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
from macpo.engine.planning.calibrate import calibrate, measure, pairs, this_machine
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.step_time import Machine

FULL = FullSettings()
LORA = LoraSettings(rank=8, target_modules="all-linear")
LIMIT = 0.25


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
    parser.add_argument("--json-dir", type=Path, help="write plan.json there")
    arguments = parser.parse_args(argv)
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


if __name__ == "__main__":
    raise SystemExit(main())
