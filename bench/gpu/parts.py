"""What the suite runs, in an order by worth: what never ran on a GPU, the figures, the rivals, then the rest.

The limits of the default parts fit into one call of MINUTES. The parts after them, `extra`, run in what is left.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MINUTES = 9.3
START_S = 12  # interpreter, imports, first allocation: not available to a benchmark's own clock

# Every file in which a test needs a GPU, or runs real Triton kernels where there is one; the first three hold what no
# GPU has run yet. A test compares this list with the tests themselves.
NEW_TESTS = (
    "tests/kernels/test_kernels_cuda.py",
    "tests/engine/generation/test_pool_graphs.py",
    "tests/engine/models/test_lora_linear.py",
)
KERNEL_TESTS = (
    *("tests/kernels/triton_backend/test_triton_head.py", "tests/kernels/triton_backend/test_triton_sampling.py"),
    *(
        "tests/kernels/test_pair_loss.py",
        "tests/kernels/test_kernels_logp.py",
        "tests/kernels/triton_backend/test_triton_prefix.py",
    ),
    *("tests/kernels/triton_backend/test_triton_decode.py", "tests/kernels/triton_backend/test_triton_routes.py"),
    *("tests/kernels/triton_backend/test_triton_plan.py", "tests/kernels/test_attention_forms.py"),
    "tests/kernels/test_vocab_shard.py",
)
# Of these files, what concerns a GPU: whole files by their names, single tests by theirs.
SELECTED = "cuda or triton or pool_graphs or gpu"
SELECTED_ON_CPU = "cuda or gpu or replays"  # all of these need a GPU but one


@dataclass(frozen=True)
class Part:
    """One process group. Commands are arguments of Python; `{out}` is the part's folder, `{data}` the pairs' source."""

    name: str
    seconds: int
    """Limit: the part is killed after so long."""
    about: str
    command: tuple[str, ...]
    small: tuple[str, ...] = ()
    """The same code at small sizes on a CPU; empty where only a GPU can run it."""
    needs: tuple[str, ...] = ()
    """Modules without which the part is skipped, beside torch, transformers and the project's own."""
    result: str = ""
    """File name in bench/results/<device>, without .json."""
    extra: bool = False
    why_cuda: str = ""
    """Why the part makes sense on a GPU only, where `small` is empty."""


def bench(script: str, seconds: int, only: str, *options: str) -> tuple[str, ...]:
    """Return the command of a benchmark at the GPU's shapes, told what its own clock may take."""
    clock = str(seconds - START_S)
    return ("-m", f"bench.bench_{script}", "--shapes", "gpu", "--only", only, "--seconds", clock, *options, *TO)


def small(script: str, *options: str) -> tuple[str, ...]:
    return ("-m", f"bench.bench_{script}", "--shapes", "small", "--device", "cpu", *options, *TO)


TO = ("--json-dir", "{out}")
NONE = ("--peers", "none")
FEW, ROUND = ("--repeats", "7"), ("--repeats", "2")
PAIRS = ("--data", "{data}")
TEXT = "V128256 bf16 text"


def tests() -> Part:
    processes = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    run = ("-m", "bench.harness.pytest_report", "{out}/tests.json")
    files = (*NEW_TESTS, *KERNEL_TESTS)
    return Part(
        "tests",
        98,
        "tests that only a GPU can run, then the kernels' with real Triton",
        (*run, "--shards", processes, "-k", SELECTED, *files),
        (*run, "--shards", "1", "-k", SELECTED_ON_CPU, *files),
        needs=("pytest",),
        result="tests",
    )


def train(name: str, seconds: int, about: str, only: str, rivals: str, tiny: str, **fields: object) -> Part:
    """Make a part of whole preference-training steps."""
    return Part(
        name,
        seconds,
        about,
        bench("train_step", seconds, only, "--rounds", "2", "--rivals", rivals, *PAIRS),
        small("train_step", "--only", tiny, "--rounds", "1", "--rivals", rivals, *PAIRS),
        **fields,  # type: ignore[arg-type]
    )


def figures() -> list[Part]:
    """Return the parts that measure ours alone."""
    losses = f"N4096 H4096 {TEXT},N4096 H2048 {TEXT} frozen"
    scores = f"N4096 H4096 {TEXT} score,N4096 H2048 {TEXT} score"
    return [
        Part(
            "losses", 65, "DPO loss and gradient from the head, beside eager float32",
            bench("pair_loss", 65, losses, "--peers", "float32", *FEW),
            small("pair_loss", *NONE, *ROUND), result="pair_loss",
        ),
        Part(
            "scoring", 26, "token log-probs from the head",
            bench("linear_logp", 26, scores, *NONE, *FEW), small("linear_logp", *NONE, *ROUND), result="linear_logp",
        ),
        Part(
            "sampling", 26, "one token a row from filtered logits, beside softmax + multinomial",
            bench("sampling", 26, "B", "--peers", "softmax", *FEW),
            small("sampling", *NONE, *ROUND), result="sampling",
        ),
        train(
            "train", 90, "our whole training steps, LoRA, 8B and 1B shapes", "lora", "none", "tiny lora fp32",
            result="train_step",
        ),
        Part(
            "generation", 80, "our generation, 1B and 8B shapes, 1,024 requests",
            bench("generation", 80, "hh-like-1024", *NONE, *ROUND),
            small("generation", *NONE, *ROUND), result="generation",
        ),
        Part(
            "profile", 40, "where a LoRA micro-batch of 16 pairs spends its time",
            ("-m", "bench.gpu.profile_step", "--shapes", "gpu", *PAIRS, *TO),
            ("-m", "bench.gpu.profile_step", "--shapes", "small", *PAIRS, *TO), result="profile",
        ),
        Part(
            "prefix_attention", 34, "attention over shared prompts, forward and backward",
            bench("prefix_attention", 34, "d128 bf16 forward+backward", *NONE, *FEW),
            small("prefix_attention", *NONE, *ROUND), result="prefix_attention",
        ),
        Part(
            "paged_attention", 22, "decode attention over a block table",
            bench("paged_attention", 22, "B", *NONE, *FEW),
            small("paged_attention", *NONE, *ROUND), result="paged_attention",
        ),
    ]  # fmt: skip


def rivals() -> list[Part]:
    return [
        train(
            "rival_trl", 34, "a 1B LoRA step beside TRL's DPOTrainer at its best", "1B lora", "best", "tiny lora fp32",
            needs=("trl", "datasets"), result="train_step_rivals",
        ),
        Part(
            "rival_generate", 36, "1B generation beside Hugging Face's generate",
            bench("generation", 36, "Llama 1B hh-like-256", "--peers", "batches of 256", *ROUND),
            small("generation", "--peers", "batches of 8", *ROUND), result="generation_rivals",
        ),
    ]  # fmt: skip


def rest() -> list[Part]:
    """Return what runs in the time that the parts before it left."""
    parts = [
        Part(
            "loop", 60, "the whole method on the device, twice: equal bits?",
            ("-m", "bench.gpu.whole_loop", "--runs", "2", *TO),
            ("-m", "bench.gpu.whole_loop", "--runs", "1", *TO), result="loop", extra=True,
        ),
        train(
            "train_full", 60, "whole steps of full fine-tuning, 1B shape", "1B full", "none", "tiny full bf16",
            result="train_step_full", extra=True,
        ),
        Part(
            "candidates", 60, "scoring 4 candidates a prompt, 1B shape, beside padded forwards",
            bench("scoring", 60, "Llama 1B", "--peers", "batches of 32", *ROUND),
            small("scoring", *NONE, *ROUND), result="scoring", extra=True,
        ),
        Part(
            "plan", 60, "predicted against measured step times",
            ("-m", "bench.bench_plan", "--shapes", "gpu", "--repeats", "3", *TO),
            ("-m", "bench.bench_plan", "--shapes", "small", "--repeats", "1", *TO), result="plan", extra=True,
        ),
    ]  # fmt: skip
    for name in ("attention", "decode", "sample", "rows", "gemm"):
        command = ("-m", "bench.tune", "--part", name, "--json", f"{{out}}/tune_{name}.json")
        why = "times launch configurations of Triton kernels inside CUDA graphs"
        about = f"launch configurations: {name}"
        parts.append(Part(f"tune_{name}", 90, about, command, result=f"tune_{name}", extra=True, why_cuda=why))
    return parts


def all_parts() -> list[Part]:
    return [tests(), *figures(), *rivals(), *rest()]


def listing(parts: list[Part]) -> str:
    """Format the parts with their limits and the sum of the default ones."""
    lines = [f"{part.name:18}{part.seconds:5} s  {part.about}{' (extra)' if part.extra else ''}" for part in parts]
    total = sum(part.seconds for part in parts if not part.extra)
    lines.append(f"default parts: {total} s = {total / 60:.2f} min; extra ones run in the time that is left")
    return "\n".join(lines)
