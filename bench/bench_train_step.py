"""A whole preference-training step beside TRL's DPOTrainer: reference pass, forward, backward, optimiser.

    python -m bench.bench_train_step [--shapes small|issue|gpu] [--only SUBSTRING] [--rivals SUBSTRING,...]
        [--rounds 5] [--json-dir DIR]
    python -m bench.bench_train_step --model FOLDER [--dtype bfloat16]     a pretrained model, all weights trained

Rounds: each takes other pairs and every rival trains a fresh model on all of them once, in an order that turns, so
that a busy machine slows all alike. Ratios are of times in the same round: their median and quartiles over rounds.
Pairs come in windows of nearly one length, drawn evenly over the lengths of the data: TRL at its best has a window a
step (as if all of the data were sorted), everybody else the same pairs shuffled.

TRL's defaults: gradient checkpointing, bfloat16 (autocast over float32 weights), a second model or the adapter turned
off in every step, batches padded to their longest pair. At its best: no checkpointing, reference log-probs
precomputed, lengths sorted, and the number of pairs a forward (gradients accumulated) that is fastest of several. The
reference pass counts for all, over the same pairs.

Before the first round each rival trains once untimed, and is left out as wrong unless the tokens are ours, the first
loss is ours, later losses too where the order is the same, and so are the reference log-probs that it precomputed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig

from bench.harness.device import default_device, device_name, device_slug, gemm, provenance
from bench.harness.measure import RESULTS, finite, reason_of
from bench.harness.timing import stretch
from bench.inputs.hh import GENERATED, source_of
from bench.inputs.pairs import PairData, load_pairs
from bench.peers.trainers import DEFAULTS, LORA, OURS, Outcome, Rival, Setup, Work, best_for, cpu_peak
from macpo.engine.models.flops import ModelShape, counts_of, forward_flops, model_flops

MAX_LENGTH = 1024  # TRL's default max_length; longer pairs are left out
# Largest difference of a loss from ours, and of a reference log-prob relative to its size: sums over tens of tokens
# whose logits carry 24 or 8 bits.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LOGP_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
STRETCH = 20  # GEMMs that are timed together


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and against whom."""

    name: str
    model: dict[str, Any]
    tuning: Literal["full", "lora"]
    dtype: torch.dtype
    pairs_per_step: int
    steps: int
    """Optimiser steps per round."""
    only: tuple[Rival, ...] = ()
    """Rivals; empty takes ours, TRL's defaults, and TRL at its best with several sizes of a forward."""
    folder: str | None = None
    """Folder of a pretrained model, whose configuration `model` is; None trains random weights."""

    @property
    def rivals(self) -> tuple[Rival, ...]:
        return self.only or (OURS, DEFAULTS, *best_for(self.pairs_per_step))

    def config(self) -> PretrainedConfig:
        """The pretrained model's, else a Llama whose ids are those of the tokenizers in bench/inputs/pairs.py."""
        if self.folder is not None:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder)
            return config
        return LlamaConfig(
            max_position_embeddings=MAX_LENGTH, bos_token_id=None, eos_token_id=0, pad_token_id=1, **self.model
        )


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


TINY = llama(32, 64, 2, 2, 2, 600, False)
LLAMA_21M = llama(256, 704, 6, 4, 4, 32000, False)  # 21.2M parameters: embedding and head 8.2M each, blocks 4.8M
LLAMA3_1B = llama(2048, 8192, 16, 32, 8, 128256, True)  # the shape of Llama 3.2 1B
LLAMA3_8B = llama(4096, 14336, 32, 32, 8, 128256, False)  # of Llama 3 8B
F32, BF16 = torch.float32, torch.bfloat16
SHORT = {F32: "fp32", BF16: "bf16"}

CASES: dict[str, list[Case]] = {
    "small": [
        Case("tiny full fp32", TINY, "full", F32, 2, 2),
        Case("tiny full bf16", TINY, "full", BF16, 2, 2),
        Case("tiny lora fp32", TINY, "lora", F32, 2, 2),
    ],
    "issue": [
        Case("21M full bf16", LLAMA_21M, "full", BF16, 8, 4),
        Case("21M full fp32", LLAMA_21M, "full", F32, 8, 4),
    ],
    "gpu": [
        Case("Llama-3-8B lora bf16", LLAMA3_8B, "lora", BF16, 16, 8),
        Case("Llama-3-1B lora bf16", LLAMA3_1B, "lora", BF16, 16, 8),
        Case("Llama-3-1B full bf16", LLAMA3_1B, "full", BF16, 16, 8),
    ],
}


@dataclass
class Result:
    """One rival in one case. Ratios are its time / ours in the same round: above 1, ours is faster."""

    rival: str
    status: str
    """"ok", "wrong" or "absent"."""
    reason: str = ""
    first_loss: float | None = None
    seconds: list[float] = field(default_factory=list)
    """Time of each round: reference pass and all steps."""
    reference_share: float | None = None
    """The reference pass's share of the time, where it is a separate pass."""
    pairs_per_s: float | None = None
    useful_tokens_per_s: float | None = None
    """Tokens of responses and of prompts, one prompt per pair."""
    times_ours: float | None = None
    times_ours_quartiles: tuple[float, float] | None = None
    share_of_floor: float | None = None
    """Shared-prefix floor (the FLOP of engine/models/flops.py at the GEMM's speed in that round) / time."""
    tflop_per_s: float | None = None
    """The floor's FLOP per second; recomputation and padding do not count."""
    peak_bytes: int | None = None


def draw(data: PairData, case: Case, number: int) -> Work:
    """Draw a round's pairs: for each step one window of similar lengths, evenly over the data's lengths."""
    rng = random.Random(f"round {number}")
    ranked = sorted(range(len(data.groups)), key=lambda i: (data.groups[i].max_length, i))
    by_length: list[int] = []
    for step in range(case.steps):
        low, high = (len(ranked) * k // case.steps for k in (step, step + 1))
        start = rng.randint(low, high - case.pairs_per_step)
        by_length += ranked[start : start + case.pairs_per_step]
    return Work(rng.sample(by_length, len(by_length)), by_length)


def judge(case: Case, rival: Rival, ours: Outcome, theirs: Outcome, work: Work) -> str:
    """Say what is wrong with an outcome; "" where it agrees with ours."""
    tolerance = LOSS_TOLERANCE[case.dtype]
    losses = theirs.losses if rival.order(work) == OURS.order(work) else theirs.losses[:1]
    for step, (a, b) in enumerate(zip(losses, ours.losses, strict=False), start=1):
        if not abs(a - b) <= tolerance:
            return f"loss {a:.6f} in step {step}, ours {b:.6f}"
    if len(theirs.losses) != case.steps:
        return f"{len(theirs.losses)} losses of {case.steps} steps"
    if theirs.ref_logps is not None and ours.ref_logps is not None:
        place = {index: row for row, index in enumerate(OURS.order(work))}
        expected = ours.ref_logps[[place[index] for index in rival.order(work)]]
        error = ((theirs.ref_logps - expected).abs() / expected.abs().clamp_min(1.0)).max().item()
        if not error <= LOGP_TOLERANCE[case.dtype]:
            return f"reference log-probs differ by {error:.1e}"
    return ""


class Ceiling:
    """The vendor's GEMM at the shape of an MLP of the model, over a step's tokens.

    In float32 too where that is faster: a CPU without bfloat16 products emulates them, which is no ceiling.
    """

    def __init__(self, setup: Setup) -> None:
        mean = sum(group.num_tokens for group in setup.data.groups) / len(setup.data.groups)
        rows = max(1, round(mean * setup.pairs_per_step))
        hidden, inner = setup.config.hidden_size, setup.config.intermediate_size
        x, weight = (torch.randn(n, hidden, device=setup.device) for n in (rows, inner))
        self.runs = [gemm(x.to(dtype), weight.to(dtype)) for dtype in {setup.dtype, torch.float32}]
        self.flop = 2.0 * rows * hidden * inner
        self.device = setup.device

    def flop_per_s(self) -> float:
        """Return the best of three stretches of calls, which other work on the device disturbs least."""
        return self.flop / min(stretch(run, STRETCH, self.device) for run in self.runs for _ in range(3))


def run_case(
    case: Case, data: PairData, device: torch.device, rounds: int, end: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check every rival, then time them in turns until `end` (time.monotonic); return the case's result."""
    setup = Setup(case.config(), case.tuning, case.dtype, device, case.pairs_per_step, data, weights=case.folder)
    results = check(case, setup)
    for result in results.values():
        say(f"  {result.rival}: {result.status} {result.reason}")
    running = [rival for rival in case.rivals if results[rival.name].status == "ok"]
    shape, ceiling = ModelShape.of(setup.config), Ceiling(setup)
    rank = LORA.rank if case.tuning == "lora" else 0
    tokens, flops, speeds = [], [], []
    reference = dict.fromkeys(results, 0.0)
    for number in range(1, rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        work = draw(data, case, number)
        groups = [data.groups[i] for i in work.shuffled]
        counts = counts_of(groups, shape.windows)
        tokens.append(counts.tokens)
        flops.append(forward_flops(shape, counts) + model_flops(shape, counts, tuning=case.tuning, rank=rank))
        found = [ceiling.flop_per_s()]
        turn = number % len(running)
        for rival in running[turn:] + running[:turn]:
            outcome, result = rival.run(setup, work), results[rival.name]
            found.append(ceiling.flop_per_s())
            result.seconds.append(outcome.seconds)
            reference[rival.name] += outcome.reference_s
            if outcome.peak_bytes is not None:
                result.peak_bytes = max(result.peak_bytes or 0, outcome.peak_bytes)
        speeds.append(statistics.median(found))
        say(f"  round {number}: " + ", ".join(f"{r.name} {results[r.name].seconds[-1]:.2f} s" for r in running))
    floors = [flop / speed for flop, speed in zip(flops, speeds, strict=True)]
    for rival in running:
        result = results[rival.name]
        result.reference_share = reference[rival.name] / sum(result.seconds) or None
        result.tflop_per_s = statistics.median(f / s for f, s in zip(flops, result.seconds, strict=True)) / 1e12
        summarise(result, results[OURS.name].seconds, case.steps * case.pairs_per_step, tokens, floors)
    return {
        "name": case.name,
        "model": {**case.model, "parameters": shape.num_parameters},
        "tuning": case.tuning,
        "dtype": str(case.dtype).removeprefix("torch."),
        "pairs_per_step": case.pairs_per_step,
        "steps_per_round": case.steps,
        "rounds": len(floors),
        "useful_tokens": tokens,
        "floor_s": floors,
        "gemm_tflop_per_s": [speed / 1e12 for speed in speeds],
        "results": [finite(asdict(result)) for result in results.values()],
    }


def check(case: Case, setup: Setup) -> dict[str, Result]:
    """Run every rival once, untimed, and compare it with ours. It also warms up what compiles."""
    work = draw(setup.data, case, 0)
    results: dict[str, Result] = {}
    ours: Outcome | None = None
    for rival in case.rivals:
        result = results[rival.name] = Result(rival.name, "ok")
        try:
            outcome = rival.run(setup, work)
        except Exception as error:
            if rival is OURS:
                raise
            result.status, result.reason = "absent", reason_of(error)
            continue
        ours = ours or outcome
        result.first_loss = outcome.losses[0]
        result.reason = judge(case, rival, ours, outcome, work)
        if result.reason:
            result.status = "wrong"
        elif setup.device.type == "cpu":
            last = work.by_length[-case.pairs_per_step :]  # the longest pairs of the round
            result.peak_bytes = cpu_peak(rival, setup, Work(last, last))
    return results


def summarise(
    result: Result, ours: Sequence[float], num_pairs: int, tokens: Sequence[int], floors: Sequence[float]
) -> None:
    """Fill in what follows from the rounds' seconds."""
    result.pairs_per_s = num_pairs / statistics.median(result.seconds)
    result.useful_tokens_per_s = statistics.median(n / s for n, s in zip(tokens, result.seconds, strict=True))
    ratios = [a / b for a, b in zip(result.seconds, ours, strict=True)]
    result.times_ours = statistics.median(ratios)
    if len(ratios) > 1:
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        result.times_ours_quartiles = (first, third)
    result.share_of_floor = statistics.median(f / s for f, s in zip(floors, result.seconds, strict=True))


def table(entry: dict[str, Any]) -> Iterator[str]:
    """Format one case, line by line."""
    model = entry["model"]
    yield (
        f"{entry['name']}: {model['parameters'] / 1e6:.1f}M parameters, {entry['pairs_per_step']} pairs a step, "
        f"{entry['rounds']} rounds of {entry['steps_per_round']} steps"
    )
    heads = ("pairs/s", "tokens/s", "x ours", "q1-q3", "of floor", "TF/s", "ref pass", "peak MB", "first loss")
    yield f"  {'rival':26}" + "".join(f"{head:>12}" for head in heads)
    for result in entry["results"]:
        if result["status"] != "ok":
            yield f"  {result['rival']:26}{result['status']}: {result['reason']}"
            continue
        quartiles = result["times_ours_quartiles"]
        cells = (
            f"{result['pairs_per_s']:.3g}",
            f"{result['useful_tokens_per_s']:.0f}",
            f"{result['times_ours']:.2f}",
            f"{quartiles[0]:.2f}-{quartiles[1]:.2f}" if quartiles else "-",
            f"{result['share_of_floor']:.0%}",
            f"{result['tflop_per_s']:.3g}",
            f"{result['reference_share']:.0%}" if result["reference_share"] else "in steps",
            f"{result['peak_bytes'] / 2**20:.0f}",
            f"{result['first_loss']:.6f}",
        )
        yield f"  {result['rival']:26}" + "".join(f"{cell:>12}" for cell in cells)


def named(rival: Rival, wanted: Sequence[str]) -> bool:
    """Say whether one of the substrings is in the rival's name."""
    return any(part in rival.name for part in wanted)


def pretrained(folder: str, dtype: torch.dtype) -> Case:
    """A pretrained model, all of whose weights are trained."""
    name, shape = Path(folder).name, AutoConfig.from_pretrained(folder).to_dict()
    kept = {key: shape[key] for key in (*LLAMA_21M,) if key in shape}
    return Case(f"{name} full {SHORT[dtype]}", kept, "full", dtype, 8, 2, folder=folder)


def data_of(case: Case, folder: Path | None) -> PairData:
    """The case's pairs in its own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(case.folder) if case.folder else None
    return load_pairs(folder, min(32000, case.model["vocab_size"]), MAX_LENGTH, 1600, tokenizer=tokenizer)


LEGEND = """\
tokens/s: useful ones, a pair's prompt once; x ours: its time / ours in the same round (above 1, ours is faster)
of floor: time that the FLOP of prompts once, responses, a reference pass and a step need at the GEMM's speed / time
peak MB: most memory at once, weights and optimiser included (CPU: of one step of the longest pairs)"""


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--shapes", choices=CASES, help="default: gpu on a GPU, else issue")
    parser.add_argument("--model", metavar="FOLDER", help="a pretrained model in place of the shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --model")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name holds this")
    parser.add_argument("--rivals", default="", metavar="SUBSTRING,...", help="besides ours only rivals so named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round begins after its case's share of these")
    parser.add_argument(
        "--data", metavar="FOLDER", help=f"of HH-RLHF's layout; `{GENERATED}` for none; default: HH where it is"
    )
    parser.add_argument("--json-dir", type=Path, help="folder of the result; default bench/results/<device>")
    args = parser.parse_args(argv)
    shapes = args.shapes or ("gpu" if args.device.type == "cuda" else "issue")
    cases = [pretrained(args.model, getattr(torch, args.dtype))] if args.model else CASES[shapes]
    cases = [case for case in cases if args.only in case.name]
    if not cases:
        parser.error(f"no case fits --only {args.only!r}")
    wanted, folder = args.rivals.split(","), source_of(args.data)
    cases = [replace(case, only=(OURS, *(r for r in case.rivals[1:] if named(r, wanted)))) for case in cases]
    entries: list[dict[str, Any]] = []
    failed: list[str] = []
    name = f"train_step-{Path(args.model).name}-{args.dtype}" if args.model else "train_step"
    path = (args.json_dir or RESULTS / device_slug(args.device)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"train_step: {device_name(args.device)}, torch {torch.__version__}\n{LEGEND}", flush=True)
    end, data, vocab = time.monotonic() + args.seconds, None, 0
    for number, case in enumerate(cases):
        if data is None or vocab != case.model["vocab_size"]:
            data, vocab = data_of(case, folder), case.model["vocab_size"]
            print(json.dumps(data.describe()), flush=True)
        share = (end - time.monotonic()) / (len(cases) - number)
        print(case.name, flush=True)
        try:
            entry = run_case(case, data, args.device, args.rounds, time.monotonic() + share, partial(print, flush=True))
        except Exception:  # out of memory, say: the cases after it still count
            traceback.print_exc()
            failed.append(case.name)
            continue
        entries.append({**entry, "data": data.describe()})
        body = {"bench": "train_step", **provenance(args.device), "cases": entries}
        path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print("\n".join(table(entry)), flush=True)
    if failed:
        raise SystemExit(f"error: {', '.join(failed)}: see above")
    print(f"written: {path}", flush=True)
    return path


if __name__ == "__main__":
    main()
