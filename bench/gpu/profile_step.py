"""Where a LoRA micro-batch of 16 pairs spends its time: kernels by name, their number, and how long none runs.

    python -m bench.gpu.profile_step [--shapes small|gpu] [--data FOLDER|generated] [--json-dir DIR]

"host" is the time until Python has launched five micro-batches, "wall" until they are done; where both are nearly
equal, the device waits for Python. "busy" is the sum of the kernels' times in one profiled micro-batch. On a CPU the
table has operators instead of kernels, and no busy time.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.bench_train_step import LLAMA3_1B, LLAMA3_8B, MAX_LENGTH, TINY, Case
from bench.harness.device import default_device, device_name, provenance, synchronise
from bench.inputs.hh import source_of
from bench.inputs.pairs import PairData, load_pairs
from bench.peers.trainers import LORA
from macpo.engine.config import ParallelSettings, PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.training.objectives import preference

PAIRS, WARM, TIMED, TOP = 16, 3, 5, 30
SHAPES = {"small": {"tiny": TINY}, "gpu": {"Llama-3-8B": LLAMA3_8B, "Llama-3-1B": LLAMA3_1B}}


def profile(name: str, shape: dict[str, Any], data: PairData, device: torch.device) -> dict[str, Any]:
    """Time micro-batches of the model and profile one; return the case's result, times in ms."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(Case(name, shape, "lora", dtype, PAIRS, 1).config())
    model = model.to(dtype)
    adapted = lora.new_adapter(model.requires_grad_(False), LORA, seed=0)
    policy = parallelize(PolicyModule(adapted, compute_dtype=dtype), ParallelSettings(), World())
    groups = data.groups[:PAIRS]
    objective = preference(PreferenceSettings(batch=PAIRS, learning_rate=1e-4), torch.zeros(PAIRS, 2))

    def step() -> None:
        for parameter in policy.trainable_parameters().values():
            parameter.grad = None
        (batch,) = pack(groups, max_tokens=1 << 30)
        objective(policy, batch, PAIRS)[0].backward()

    for _ in range(WARM):
        step()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(TIMED):
        step()
    host = time.perf_counter() - start
    synchronise(device)
    wall = time.perf_counter() - start
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronise(device)
    return {
        "name": f"{name} lora, {PAIRS} pairs",
        "tokens": sum(group.num_tokens for group in groups),
        "wall_ms": wall / TIMED * 1e3,
        "host_ms": host / TIMED * 1e3,
        **kernels_of(profiler, device),
    }


def kernels_of(profiler: Any, device: torch.device) -> dict[str, Any]:
    """Return number and summed time of the profiled kernels (on a CPU operators), and the TOP of them by time."""
    if device.type == "cuda":
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        times = [(event.name, event.device_time) for event in events]
    else:
        times = [(event.name, event.self_cpu_time_total) for event in profiler.events()]
    total, number = Counter[str](), Counter(name for name, _ in times)
    for name, microseconds in times:
        total[name] += microseconds
    top = [{"kernel": n[:90], "calls": number[n], "ms": us / 1e3} for n, us in total.most_common(TOP)]
    busy = sum(total.values()) / 1e3 if device.type == "cuda" else None
    return {"num_kernels": len(times), "busy_ms": busy, "top": top}


def text(case: dict[str, Any]) -> str:
    """Format one case."""
    busy = "" if case["busy_ms"] is None else f", busy {case['busy_ms']:.1f} ms"
    head = f"{case['name']}: {case['tokens']} tokens; wall {case['wall_ms']:.1f} ms, host {case['host_ms']:.1f} ms"
    lines = [f"{head}, {case['num_kernels']} kernels{busy}"]
    lines += [f"  {row['ms']:9.3f} ms {row['calls']:6} x  {row['kernel']}" for row in case["top"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=SHAPES, default="gpu" if torch.cuda.is_available() else "small")
    parser.add_argument("--data", metavar="FOLDER", help="of HH-RLHF's layout; `generated` for none")
    parser.add_argument("--json-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    device = default_device()
    print(f"profile: {device_name(device)}, torch {torch.__version__}", flush=True)
    data = load_pairs(source_of(args.data), 600 if args.shapes == "small" else 32000, MAX_LENGTH, 200)
    cases: list[dict[str, Any]] = []
    for name, shape in SHAPES[args.shapes].items():
        cases.append(profile(name, shape, data, device))
        gc.collect()
        print(text(cases[-1]), flush=True)
        body = {"bench": "profile", **provenance(device), "data": data.describe(), "cases": cases}
        (args.json_dir / "profile.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
