"""What only a GPU can show, in parts that can be stopped: each job leaves its result file and is not run again.

    python -m bench.gpu_suite --part tests|kernels|train|tune --out DIR [--minutes 9] [--only SUBSTRING,...]

tests: the kernels' tests with real Triton kernels. kernels: every operator beside every peer that imports. train:
whole steps beside TRL. tune: launch configurations. A job is a process of its own; one that fails or runs out of time
is named, and tried again by the next call. The last lines are a table of all results in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness.device import ROOT
from bench.harness.measure import LEGEND, header, row_text
from bench.run_all import result_of

KERNEL_TESTS = (
    *("test_triton_head", "test_triton_prefix", "test_triton_decode", "test_triton_sampling", "test_triton_routes"),
    *("test_kernels_logp", "test_pair_loss", "test_kernels_cuda"),
)
ALL, EXACT = "", "TRL,float32"  # peers


@dataclass(frozen=True)
class Job:
    """One process; `command` gets the folder of its result file."""

    name: str
    seconds: int
    command: tuple[str, ...]

    def run(self, out: Path, seconds: float) -> str:
        """Run it for at most `seconds`; return "" where its result is in `out`, else what went wrong."""
        with TemporaryDirectory(dir=out, prefix=".") as folder:
            command = [sys.executable, *(part.format(folder=folder) for part in self.command)]
            print(f"\n$ {' '.join(command[1:])}", flush=True)
            try:
                done = subprocess.run(command, timeout=seconds, check=False, cwd=ROOT)
            except subprocess.TimeoutExpired:
                return f"stopped after {seconds:.0f} s"
            found = list(Path(folder).glob("*.json"))
            if done.returncode or len(found) != 1:
                return f"exit status {done.returncode}, {len(found)} result files"
            found[0].replace(out / f"{self.name}.json")
        return ""


def bench(name: str, script: str, only: str, peers: str, seconds: int, shapes: str) -> Job:
    """Make the job of an operator's benchmark; small shapes run every case."""
    options = ["--shapes", shapes, "--seconds", str(int(seconds * 0.8)), "--json-dir", "{folder}"]
    options += ["--only", only] if shapes == "gpu" else []
    options += ["--peers", peers] if peers else []
    return Job(name, seconds, ("-m", f"bench.bench_{script}", *options))


def slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def jobs(part: str, shapes: str) -> list[Job]:
    if part == "tests":
        files = [f"tests/kernels/{name}.py" for name in KERNEL_TESTS]
        processes = str(min(14, os.cpu_count() or 1))
        options = ("-q", "-k", "triton or Triton or cuda", "-n", processes, "-p", "no:cacheprovider")
        report = ("-m", "bench.harness.pytest_report", "{folder}/tests.json")
        return [Job("kernel_tests", 150, (*report, *options, *files))]
    if part == "tune":
        names = ("attention", "decode", "sample", "rows", "gemm")
        return [
            Job(f"tune_{name}", 90, ("-m", "bench.tune", "--part", name, "--json", "{folder}/tune.json"))
            for name in names
        ]
    if part == "train":
        cases = ("Llama-3-8B lora bf16", "Llama-3-1B lora bf16", "Llama-3-1B full bf16")
        chosen = cases if shapes == "gpu" else ("tiny lora fp32",)
        options = ("-m", "bench.bench_train_step", "--shapes", shapes, "--rounds", "2", "--seconds", "120")
        options += ("--json-dir", "{folder}", "--only")
        return [Job(f"train_{slug(case)}", 170, (*options, case)) for case in chosen]
    text, exact = "V128256 bf16 text", ("N4096 H4096", "N8192 H4096", "N4096 H2048")
    losses = [
        bench(f"pair_loss_{slug(key)}_{head}", "pair_loss", f"{key} {text} {head}", peers, 60, shapes)
        for key, peers in zip(exact, (ALL, EXACT, EXACT), strict=True)
        for head in ("frozen", "trainable")
    ]
    scores = ",".join(f"{key} {text} score" for key in exact)
    both, attention = "bf16 forward+backward", "Flex,padded,varlen"
    return [
        *losses,
        bench("pair_loss_whole_sequences", "pair_loss", "prompt200", "Liger DPO,TRL,float32", 60, shapes),
        bench("pair_loss_random", "pair_loss", "N4096 H4096 V128256 bf16 random", EXACT, 40, shapes),
        bench("linear_logp", "linear_logp", scores, "TRL", 40, shapes),
        bench("prefix_attention_d128", "prefix_attention", f"d128 {both}", attention, 90, shapes),
        bench("prefix_attention_d64", "prefix_attention", f"d64 {both}", attention, 90, shapes),
        bench("paged_attention", "paged_attention", "B", "gather,varlen", 60, shapes),
        bench("sampling", "sampling", "B", "HF,softmax,exponential", 60, shapes),
    ]


def table(out: Path) -> Iterator[str]:
    """Format every result in a folder."""
    yield LEGEND
    for path in sorted(out.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        if "tests" in body:
            yield f"\n{path.stem}: {body['tests']}"
        for case in body.get("cases", ()):
            if "ceiling" in case:
                yield f"\n{path.stem}: {case['name']}  [{case['ceiling']}]"
                yield header()
                yield from (f"  {row_text(result_of(fields))}" for fields in case["results"])
            else:
                yield f"\n{path.stem}: {case['name']}"
                for fields in case["results"]:
                    shown = {key: fields[key] for key in ("status", "pairs_per_s", "times_ours", "share_of_floor")}
                    yield f"  {fields['rival']:28} {shown}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("tests", "kernels", "train", "tune"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", metavar="SUBSTRING,...", help="jobs whose name holds one of these")
    parser.add_argument("--shapes", choices=("gpu", "small"), default="gpu", help="small: end to end on a CPU")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end, problems = time.monotonic() + args.minutes * 60, {}
    for job in jobs(args.part, args.shapes):
        left = end - time.monotonic()
        if not any(part in job.name for part in args.only.split(",")) or (args.out / f"{job.name}.json").exists():
            continue
        problems[job.name] = "no time left" if left < 10 else job.run(args.out.resolve(), min(left, job.seconds))
    print("\n".join(table(args.out)))
    failed = {name: problem for name, problem in problems.items() if problem}
    for name, problem in failed.items():
        print(f"{name}: {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
