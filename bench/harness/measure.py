"""What the benchmarks share: peers that take turns, each checked before its time counts; one table; one JSON file.

A case is one input at one shape. Its first peer is ours. A peer that does not import or run is listed with the reason.
Every other one's results are compared with a float64 reference in the same run: one that computes something else is
shown as wrong and not timed. Timed calls wait for the device. In each round all peers run once, in an order that
turns, so a busy machine slows all alike; ratios are medians over rounds (`timing.py`).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch's profiler is loaded

import torch
from torch import Tensor

from bench.harness import memory
from bench.harness.device import copy, device_slug, gemm, provenance, synchronise
from bench.harness.timing import Outputs, Run, calls_for, in_graph, rounds_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
# A result is exact up to this relative error (Euclidean norm, against float64): a few times what the project's own
# tests allow. Up to ten times that it is called inexact (logits rounded to 16 bits, gradients filtered) and timed;
# above, wrong.
# Log-probs are float32 numbers whatever the inputs are: those made of logits that were rounded to 16 bits are inexact.
LOGPS, EXACT_LOGPS = ("logp", "logps"), 1e-5
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INEXACT_FACTOR = 10
CEILING_NOTE = "the ceiling"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Dtypes in the names of cases."""


class Unavailable(Exception):
    """A peer cannot take part here; the message says why."""


def reason_of(error: Exception) -> str:
    text = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200]


def imported(module: str, name: str, problem: str) -> Any:
    """Return what a peer needs from a module; Unavailable with `problem` and the reason where it does not import."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{problem}: {error}") from error


def needs_cuda(device: torch.device, what: str = "kernels") -> None:
    if device.type != "cuda":
        raise Unavailable(f"its {what} are for CUDA tensors")


@dataclass(frozen=True)
class Peer:
    """One implementation. `build` is untimed (imports, padding, compilers' wrappers) and returns the timed call."""

    name: str
    build: Callable[[], Run]
    view: Callable[[Outputs], Outputs] = lambda outputs: outputs
    """Brings the outputs into the reference's layout; untimed."""
    reference: Outputs | None = None
    """The reference of the variant that this peer computes; None for the case's own."""
    note: str = ""


@dataclass
class Case:
    """One input at one shape."""

    name: str
    shape: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    peers: Sequence[Peer]
    reference: Outputs
    """Float64; empty where `check` judges."""
    check: Callable[[Outputs], float] | None = None
    """Computes the error of outputs without a reference (samplers); the same bounds apply."""
    flop: float = 0.0
    """FLOP of the algorithm, without recomputation."""
    num_bytes: float = 0.0
    """Bytes that have to be read and written at least."""
    ceiling: Run | None = None
    """The vendor's GEMM or a copy, timed in the same rounds."""
    ceiling_name: str = ""
    ceiling_work: float = 0.0
    """FLOP or bytes of `ceiling`."""
    traced: bool = True
    """Whether a CPU's memory is measured by a trace of the call; else by the process's resident size."""
    graph: bool = False
    """Whether peers are timed inside a CUDA graph, on a GPU."""
    items: float = 0.0
    """Number of items that a call produces, such as useful tokens; the table then shows items per second."""
    item_name: str = "tok"
    unit_work: float = 0.0
    """Work that counts as 1 in `floor_units`: one head GEMM for a head; 0 for all of the case's own work."""
    floor_ms: float = 0.0
    """Least time that the case can take here, where it was computed from measured rates."""
    floor_name: str = ""
    """The parts of the floor."""


@dataclass
class Result:
    """One peer on one case. Times in ms; None where it was not timed."""

    peer: str
    status: str
    """"exact", "inexact", "wrong" or "absent"."""
    reason: str = ""
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    rounds: int = 0
    times_ours: float | None = None
    """Median over rounds of this peer's time / ours in the same round: above 1, ours is faster."""
    floor_units: float | None = None
    """Median over rounds of time / time that the ceiling needs for `unit_work`: for a head, how many head GEMMs."""
    share_of_ceiling: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    items_per_s: float | None = None
    peak_extra_bytes: int | None = None
    returned_bytes: int | None = None
    peak_resident_bytes: int | None = None

    @property
    def error(self) -> float:
        return max(self.errors.values(), default=0.0)


def head_ceiling(hidden: Tensor, weight: Tensor, name: str) -> dict[str, Any]:
    """Return the fields of a case whose ceiling is the vendor's hidden @ weight'."""
    work = 2.0 * hidden.shape[0] * weight.numel()
    return {"ceiling": gemm(hidden, weight), "ceiling_name": f"vendor GEMM{name}", "ceiling_work": work}


def copy_ceiling(num_bytes: float, least_on_cpu: int, device: torch.device) -> dict[str, Any]:
    """Return the fields of a case whose ceiling is a copy of as many bytes, but of enough to be timed."""
    moved = max(int(num_bytes), 2**28 if device.type == "cuda" else least_on_cpu)
    name = f"copy of {moved / 2**20:.0f} MB"
    return {"ceiling": copy(moved, device), "ceiling_name": name, "ceiling_work": float(moved)}


def relative_errors(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """Return ||output - reference|| / ||reference|| of each; infinite if missing, misshapen or not finite."""
    errors = {}
    for name, expected in reference.items():
        actual = outputs.get(name)
        if actual is None or actual.shape != expected.shape:
            errors[name] = float("inf")
            continue
        size = expected.double().norm().item() or 1.0
        error = (actual.double() - expected.double()).norm().item() / size
        errors[name] = error if error == error else float("inf")
    return errors


def judge(case: Case, peer: Peer, outputs: Outputs) -> Result:
    """Return status and errors of a peer's outputs."""
    if case.check is not None:
        errors = {"check": case.check(peer.view(outputs))}
    else:
        errors = relative_errors(peer.view(outputs), case.reference if peer.reference is None else peer.reference)
    result = Result(peer.name, "exact", note=peer.note, errors=errors)
    limit = EXACT[case.dtype]
    if result.error > limit * INEXACT_FACTOR:
        result.status, result.reason = "wrong", f"error {result.error:.1e}"
    elif any(e > (min(limit, EXACT_LOGPS) if name in LOGPS else limit) for name, e in errors.items()):
        result.status = "inexact"
    return result


def prepare(case: Case, peer: Peer) -> tuple[Result, Run | None]:
    """Build a peer, run it once and judge it; the returned call is None where it must not be timed."""
    try:
        run = peer.build()
        outputs = run()
        synchronise(case.device)
        result = judge(case, peer, outputs)
    except Exception as error:  # a peer may fail in any way; the table says how
        return Result(peer.name, "absent", reason=reason_of(error), note=peer.note), None
    return result, None if result.status == "wrong" else run


def measure(case: Case, repeats: int, budget_s: float, check_s: float = 0.0) -> list[Result]:
    """Check and time every peer of a case.

    Building and checking takes at most half of `budget_s`, or `check_s` where that is more (compilers work in the
    first case): peers that are not reached by then are listed as absent. Then come at least two rounds, and as many
    as `repeats` and the rest of the time allow.
    """
    begin = time.perf_counter()
    results: list[Result] = []
    runs: dict[str, Run] = {}
    num_calls: dict[str, int] = {}
    for peer in case.peers:
        if runs and time.perf_counter() - begin > max(budget_s / 2, check_s):
            results.append(Result(peer.name, "absent", reason="not reached in the time of this case", note=peer.note))
            continue
        result, run = prepare(case, peer)
        results.append(result)
        if run is None:
            continue
        start = time.perf_counter()
        peak = memory.measure(run, case.device, resident=peer is case.peers[0], traced=case.traced)
        seconds = time.perf_counter() - start
        if case.graph and case.device.type == "cuda":
            run, refusal = in_graph(run)
            result.note = "; ".join(filter(None, (result.note, refusal)))
        runs[peer.name] = run
        num_calls[peer.name] = calls_for(run, case.device, seconds)
        result.peak_extra_bytes, result.returned_bytes = peak.extra, peak.returned
        result.peak_resident_bytes = peak.resident
    if case.ceiling is not None:
        runs["ceiling"] = case.ceiling
        if case.graph and case.device.type == "cuda":
            runs["ceiling"], _ = in_graph(case.ceiling)
        runs["ceiling"]()
        synchronise(case.device)
        num_calls["ceiling"] = calls_for(runs["ceiling"], case.device, 0.0)
    left = budget_s - (time.perf_counter() - begin)
    taken = rounds_of(runs, num_calls, case.device, repeats, left, case.peers[0].name)
    for result in results:
        if result.peer in runs:
            summarise(case, result, taken[result.peer], taken.get(case.peers[0].name), taken.get("ceiling"))
    if case.ceiling is not None:
        result = Result(f"({case.ceiling_name})", "exact", note=CEILING_NOTE)
        summarise(case, result, taken["ceiling"], taken.get(case.peers[0].name), taken["ceiling"], case.ceiling_work)
        results.append(result)
    return results


def summarise(
    case: Case,
    result: Result,
    taken: Sequence[float],
    ours: Sequence[float] | None,
    ceiling: Sequence[float] | None,
    work: float | None = None,
) -> None:
    """Fill in a result's times and rates; `work` is what it did where that is not the case's."""
    median = statistics.median(taken)
    quartiles = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [median] * 3
    result.median_ms, result.min_ms, result.max_ms = median * 1e3, min(taken) * 1e3, max(taken) * 1e3
    result.quartiles_ms = (quartiles[0] * 1e3, quartiles[2] * 1e3)
    result.rounds = len(taken)
    if ours:
        result.times_ours = statistics.median(a / b for a, b in zip(taken, ours, strict=False))  # the rounds of both
    if ceiling:
        times_ceiling = statistics.median(a / b for a, b in zip(taken, ceiling, strict=False))
        done = work or case.flop or case.num_bytes
        result.floor_units = times_ceiling * case.ceiling_work / (case.unit_work or done)
        result.share_of_ceiling = done / case.ceiling_work / times_ceiling
    if case.flop:
        result.tflop_per_s = (work or case.flop) / median / 1e12
    if case.num_bytes:
        result.gb_per_s = (work or case.num_bytes) / median / 1e9
    if case.items and work is None:
        result.items_per_s = case.items / median


COLUMNS = ("median ms", "q1-q3 ms", "x ours", "x floor", "of ceiling", "rate", "extra MB", "error")
WIDTHS = (11, 17, 8, 9, 12, 13, 11, 10)


def table(case: Case, results: Iterable[Result]) -> Iterator[str]:
    """Format one case, line by line."""
    yield f"{case.name}  [{case.ceiling_name or 'no ceiling'}]"
    yield header()
    results = list(results)
    for result in results:
        yield "  " + row_text(result)
    if case.floor_ms:
        yield f"  [{case.floor_name}]"
        yield "  of the floor: " + ", ".join(
            f"{result.peer} {case.floor_ms / result.median_ms:.0%}"
            for result in results
            if result.median_ms and result.note != CEILING_NOTE
        )


def header() -> str:
    """Format the line above a case's results."""
    return f"  {'peer':44}" + "".join(f"{name:>{width}}" for name, width in zip(COLUMNS, WIDTHS, strict=True))


def row_text(result: Result) -> str:
    if result.median_ms is None or result.quartiles_ms is None:
        return f"{result.peer:44}{result.status}: {result.reason}"

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rate = "-"
    if result.tflop_per_s is not None:
        rate = f"{result.tflop_per_s:.3g} TF/s" if result.tflop_per_s >= 1 else f"{result.tflop_per_s * 1e3:.3g} GF/s"
    if result.gb_per_s is not None:
        rate = f"{result.gb_per_s:.3g} GB/s"
    if result.items_per_s is not None:
        rate = f"{result.items_per_s:.0f} /s"
    extra = None if result.peak_extra_bytes is None else result.peak_extra_bytes / 2**20
    q1, q3 = result.quartiles_ms
    cells = (
        f"{result.median_ms:.3g}" if result.median_ms < 100 else f"{result.median_ms:.0f}",
        f"{q1:.3g}-{q3:.3g}" if q3 < 100 else f"{q1:.0f}-{q3:.0f}",
        text(result.times_ours, ".2f"),
        text(result.floor_units, ".2f"),
        text(result.share_of_ceiling, ".0%"),
        rate,
        text(extra, ".1f"),
        text(result.error if result.errors else None, ".0e") + ("" if result.status == "exact" else "*"),
    )
    return f"{result.peer:44}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


LEGEND = """\
x ours: this peer's time / ours in the same round, median over rounds (above 1, ours is faster)
x floor: time / time that the ceiling named in [] needs in the same round for the same work (heads: for one GEMM)
rate: FLOP or bytes a second of the case's own work, or useful tokens a second where it counts those
of ceiling: work per second / that of the ceiling, recomputed work not counted
extra MB: most memory held at once beyond inputs and returned tensors; error: relative, against float64; *: inexact"""


def entry(case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """Return what a result file holds of a case."""
    return {
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ceiling": case.ceiling_name,
        "flop": case.flop,
        "bytes": case.num_bytes,
        "floor_ms": case.floor_ms,
        "floor": case.floor_name,
        "results": [finite(asdict(result)) for result in results],
    }


def save(
    bench: str, cases: Sequence[dict[str, Any]], skipped: Sequence[str], device: torch.device, folder: Path | None
) -> Path:
    """Write bench/results/<device>/<bench>.json (or in `folder`) and return its path; `skipped` names cases not run."""
    path = (folder or RESULTS / device_slug(device)) / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"bench": bench, **provenance(device), "skipped": list(skipped), "cases": list(cases)}
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def finite(value: Any) -> Any:
    """Replace infinities and NaN by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
