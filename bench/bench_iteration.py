"""One MACPO iteration with `macpo run` beside the same work as people write it today, part by part.

    python -m bench.bench_iteration [--student 21M] [--teachers 5M,5M] [--dtype float32] [--rounds 3] [--work DIR]

A model is made at random (`tiny`, `5M`, `21M`, `1B`) or named: a folder or Hub id. Ours is `macpo run` on a recipe of
one round with ready policies; a part's time is what its stages took, with loading, tokenising and writing. The rival
(`bench/peers/pipeline.py`) is `generate` in sorted static batches, padded scoring and TRL's DPOTrainer, without
loading, tokenising and writing; it works on the prompts, pairs and trained student of our run. The first round tries
several batch sizes of each of its parts and keeps the best, so its figures of that round do not count. Decoding is
greedy, so that responses can be compared: equal token ids, log-probs, the choice of the positives and the first loss
are checked. Rounds alternate; ratios are of times in the same round, their median and range over rounds. With `--work`
the files stay, and the same command goes on after a kill with the rounds that are not done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.bench_train_step import LLAMA3_1B, LLAMA_21M, TINY, llama
from bench.harness.device import default_device, device_slug, provenance
from bench.harness.measure import RESULTS
from bench.inputs.hh import HH
from bench.inputs.pairs import EOS, load_pairs
from bench.peers.pipeline import PARTS, Job
from bench.peers.trainers import MICRO
from macpo.engine.run.folder import folder_of, read_timing

MADE = {"tiny": TINY, "5M": llama(128, 352, 4, 4, 4, 32000, True), "21M": LLAMA_21M, "1B": LLAMA3_1B}
"""Shapes of models that are made; 5M: 4.1M of its 4.9M parameters are the embedding."""
BATCHES = (8, 16, 32, 96)
STAGES = {
    "teachers' responses": ["init-{teacher}-answer"],
    "scoring": ["iter1-student-score", "iter1-student-select"],
    "student's training": ["iter1-student-train"],
    "student's responses": ["iter1-student-answer"],
    "teachers' training": ["iter1-{teacher}-pairs", "iter1-{teacher}-train"],
}
LOGP_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def make_model(name: str, folder: Path, vocab_text: Path | None, seed: int) -> str:
    """Write a model with random weights, spread so that greedy tokens are no ties, or return the name of a real one."""
    if name not in MADE:
        return name
    if folder.exists():
        return str(folder)
    from transformers import LlamaConfig

    shape = MADE[name]
    tokenizer = load_pairs(vocab_text, min(32000, shape["vocab_size"]), 1024, 400).tokenizer
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.convert_tokens_to_ids(EOS), "bos_token_id": None, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **shape, **ids))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return str(folder)


def recipe(args: argparse.Namespace, models: Sequence[tuple[str, str]], data: Path, out: Path) -> dict[str, Any]:
    """One round over ready policies, a positive and a negative one of each agent, the student's first."""
    training = {"learning_rate": 1e-6, "epochs": 1, "batch": args.batch, "beta": 0.1, "sft_weight": 0.0}
    tuning = {"type": "full"} if args.tuning == "full" else {"type": "lora", "target_modules": "all-linear"}

    def agent(name: str, model: tuple[str, str], made: bool) -> dict[str, Any]:
        template = {"template": "vicuna"} if made else {}
        return {
            "name": name, "model": model[0], "positive": model[0], "negative": model[1], "tuning": tuning, **template
        }  # fmt: skip

    made = [name in MADE for name in (args.student, *args.teachers)]
    student, *teachers = (
        agent(name, model, how)
        for name, model, how in zip(
            ("student", *(f"teacher{n}" for n in range(len(args.teachers)))), models, made, strict=True
        )
    )
    return {
        "seed": 0,
        "output": str(out),
        "data": {
            "path": str(data), "teacher_prompts": 16, "student_prompts": args.prompts, "test_prompts": 8,
            "long_prompt": "truncate",
        },
        "context_tokens": args.context,
        "iterations": 1,
        "teachers": teachers,
        "student": student,
        "teacher_training": {"preference": training},
        "student_training": {"preference": training},
        "sampling": {"temperature": 0.0, "max_new_tokens": args.new_tokens},
        "evaluation": {"ceiling": False},
        "compute": {"device": args.device.type, "dtype": args.dtype, "jobs": 1, "threads": args.threads},
    }  # fmt: skip


def ours(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of every part by the run's own timings, of the command's attempts, and this process's peak memory.

    A run that is there already is gone on with: its peak is then that of the rest, and its attempts' time counts both.
    """
    file = folder / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**spec, "output": str(folder / "run")}))  # JSON is YAML
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "macpo.cli", "run", str(file)], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"macpo run ended with {os.waitstatus_to_exitcode(status)}:\n{(folder / 'log').read_text()}")
    teachers = [teacher["name"] for teacher in spec["teachers"]]
    parts = {}
    for part, names in STAGES.items():
        stages = dict.fromkeys(name.format(teacher=teacher) for name in names for teacher in teachers)
        parts[part] = sum(read_timing(folder_of(folder / "run", stage))["seconds"] for stage in stages)
    attempts = json.loads((folder / "run" / "attempts.json").read_text())["attempts"]
    return {
        "seconds": parts, "command_seconds": sum(attempt["seconds"] for attempt in attempts),
        "peak_bytes": usage.ru_maxrss * 1024, "run": str(folder / "run"),
    }  # fmt: skip


def theirs(job: Job, folder: Path) -> dict[str, Any]:
    """What the rival's process found, now or before a kill."""
    if (folder / "found.json").exists():
        before: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return before
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-m", "bench.peers.pipeline", str(folder / "job.json"), str(folder / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the rival ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def wrong(dtype: str, parts: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from ours by more than rounding."""
    problems = []
    for name, part in parts.items():
        for option, checks in part["checks"].items():
            if checks.get("logp_error", 0.0) > LOGP_TOLERANCE[dtype]:
                problems.append(f"{name}, {option}: log-probs differ by {checks['logp_error']:.1e}")
            if checks.get("loss_error", 0.0) > LOSS_TOLERANCE[dtype]:
                problems.append(f"{name}, {option}: the first loss differs by {checks['loss_error']:.1e}")
            if dtype == "float32" and checks.get("equal_share", 1.0) < 1.0:
                problems.append(f"{name}, {option}: {1 - checks['equal_share']:.1%} of the results differ")
    return problems


def measure(args: argparse.Namespace, models: Sequence[tuple[str, str]], data: Path, folder: Path) -> dict[str, Any]:
    """All rounds; the first finds the rival's best sizes."""
    batches = [size for size in BATCHES if size <= max(args.prompts, BATCHES[0])]
    micros = [size for size in MICRO if args.batch % size == 0]
    options = {part: micros if "training" in part else batches for part in PARTS}
    rounds: list[dict[str, Any]] = []
    tried: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds + 1):
        place = folder / f"round-{number}"
        mine = ours(recipe(args, models, data, place / "run"), place)
        job = Job(mine["run"], args.dtype, str(args.device), args.threads, options)
        other = theirs(job, place)
        problems = wrong(args.dtype, other["parts"])
        for problem in problems:
            print(f"differs: {problem}", flush=True)
        if number == 0:
            tried = other["parts"]
            options = {
                part: [int(min(found["seconds"], key=found["seconds"].get))] for part, found in other["parts"].items()
            }
            print(f"the rival's best: {options}", flush=True)
            continue
        seconds = {part: next(iter(found["seconds"].values())) for part, found in other["parts"].items()}
        rounds.append(
            {
                "ours": mine["seconds"], "theirs": seconds, "command_seconds": mine["command_seconds"],
                "peak_bytes": [mine["peak_bytes"], other["peak_bytes"]], "differs": problems,
            }
        )  # fmt: skip
        print(f"round {number}: {sum(mine['seconds'].values()):.1f} s, rival {sum(seconds.values()):.1f} s", flush=True)
    return {"tried": tried, "best": {part: sizes[0] for part, sizes in options.items()}, "rounds": rounds}


def ratios(rounds: Sequence[dict[str, Any]], part: str | None) -> list[float]:
    """Their time over ours in each round; of the whole iteration where no part is named."""
    names = PARTS if part is None else (part,)
    return [sum(r["theirs"][n] for n in names) / sum(r["ours"][n] for n in names) for r in rounds]


def table(found: dict[str, Any]) -> str:
    """The parts and their sum, as Markdown."""
    lines = ["| part | macpo s | as written today s | ratio [range] | its best size |", "|---|---|---|---|---|"]
    rounds = found["rounds"]
    for part in (*PARTS, None):
        names = PARTS if part is None else (part,)
        mine, other = (statistics.median(sum(r[side][n] for n in names) for r in rounds) for side in ("ours", "theirs"))
        values = ratios(rounds, part)
        size = found["best"][part] if part is not None else ""
        lines.append(
            f"| {part or 'the iteration'} | {mine:.1f} | {other:.1f} | "
            f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}] | {size} |"
        )
    peaks = [max(r["peak_bytes"][side] for r in rounds) / 1e9 for side in (0, 1)]
    lines += ["", f"Peak memory of the processes: {peaks[0]:.2f} and {peaks[1]:.2f} GB."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="21M", help=f"{', '.join(MADE)}, a folder or a Hub id")
    parser.add_argument("--teachers", default="5M,5M", type=lambda text: text.split(","))
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--dtype", choices=tuple(LOSS_TOLERANCE), default="float32")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=512, help="longest prompt and response together, in tokens")
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimiser step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="HH-RLHF's helpful-base test file; default: where it lies beside")
    parser.add_argument("--work", type=Path, help="folder of the files, which stay; default: a temporary one")
    parser.add_argument("--json-dir", type=Path, help="folder of the result; default bench/results/<device>")
    args = parser.parse_args(argv)
    data = args.data or HH / "helpful-base" / "test.jsonl.gz"
    if not data.exists():
        parser.error(f"there is no {data}: name the data with --data")
    with tempfile.TemporaryDirectory(prefix="macpo-iteration-") as temporary:
        folder = args.work or Path(temporary)
        names = (args.student, *args.teachers)
        models = [
            (
                make_model(name, folder / f"model-{n}", data.parents[1], 2 * n),
                make_model(name, folder / f"negative-{n}", data.parents[1], 2 * n + 1),
            )
            for n, name in enumerate(names)
        ]
        found = measure(args, models, data, folder)
    print(table(found), flush=True)
    about = {name: str(getattr(args, name)) for name in ("student", "tuning", "dtype", "threads")}
    about |= {name: getattr(args, name) for name in ("prompts", "new_tokens", "context", "batch")}
    path = (args.json_dir or RESULTS / device_slug(args.device)) / f"iteration-{args.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"bench": "iteration", **provenance(args.device), **about, "teachers": args.teachers, **found}
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)
    return path


if __name__ == "__main__":
    main()
