"""The table of an archive: how each part ended, and the figures that its result files hold, worst news not left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu.parts import Part
from bench.gpu.store import DONE, Store

LEGEND = """\
floor: heads: time / that of one head GEMM in the same rounds; samplers: of a copy. ceiling: work per second / that of
the vendor's GEMM or a copy. of floor: least time by FLOP or bytes at measured speeds / time"""


def table(store: Store, parts: Sequence[Part]) -> Iterator[str]:
    """Format every part, line by line."""
    yield f"\n==== summary\n{LEGEND}"
    for part in parts:
        outcome = store.outcome(part.name)
        if outcome is None:
            continue
        took = f" in {outcome.seconds:.0f} of {outcome.limit} s" if outcome.limit else ""
        yield f"{part.name}: {outcome.status}{took}{': ' * bool(outcome.reason)}{outcome.reason}"
        for body in store.results(part.name):
            yield from (f"  {line}" for line in lines(body))
    outcomes = [outcome for part in parts if (outcome := store.outcome(part.name))]
    done = sum(outcome.status == DONE for outcome in outcomes)
    yield f"{done} of {len(outcomes)} parts done" + "".join(
        f"; {outcome.name}: {outcome.status}" for outcome in outcomes if outcome.status != DONE
    )


def lines(body: dict[str, Any]) -> Iterator[str]:
    """Format a result file by what it holds."""
    if "tests" in body:
        yield str(body["tests"])
        yield from (f"FAILED {failure['test']}" for failure in body["failed"])
        yield from (f"skipped, {count}: {reason}" for reason, count in body["skipped"].items())
        yield from (f"running when it ended: {name}" for name in body["running"])
    source = body.get("data", {}).get("source")
    for case in body.get("cases", ()):
        source = case.get("data", {}).get("source", source)
        if "top" in case:
            yield profile(case)
        elif "predicted_s" in case:
            yield f"{case['name']}: {case['seconds']:.3f} s, predicted {case['error']:+.0%} off"
        else:
            yield from (f"{case['name']}: {result_line(case, result)}" for result in case["results"])
    if source:
        yield f"pairs: {source}"
    yield from (f"not run: {name}" for name in body.get("skipped", ()) if "cases" in body)
    if "differ" in body:
        times = ", ".join(f"{seconds:.1f}" for seconds in body["seconds"])
        yield f"{times} s a run; {body['files']} files, {len(body['differ'])} differ {body['differ'][:3]}"
    if "trials" in body:
        yield from fastest(body["trials"])


def fastest(trials: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Format the fastest configuration of every case of the tuning script."""
    for name in dict.fromkeys(trial["case"] for trial in trials):
        timed = [trial for trial in trials if trial["case"] == name and "ms" in trial]
        best = min(timed, key=lambda trial: float(trial["ms"]), default=None)
        yield f"{name}: {best['config']} {best['ms']:.4f} ms, of {len(timed)}" if best else f"{name}: none ran"


def result_line(case: dict[str, Any], result: dict[str, Any]) -> str:
    """Format one peer or rival of a case."""
    name = result.get("peer") or result["rival"]
    if result["status"] in ("absent", "wrong"):
        return f"{name}: {result['status']}: {result['reason']}"
    cells: list[tuple[str, str]] = [("median_ms", "{:.3g} ms"), ("pairs_per_s", "{:.3g} pairs/s")]
    cells += [("floor_units", "{:.2f} x floor"), ("share_of_ceiling", "{:.0%} of ceiling")]
    cells += [("share_of_floor", "{:.0%} of floor"), ("items_per_s", "{:.0f} tok/s"), ("times_ours", "{:.2f} x ours")]
    cells += [("first_loss", "first loss {:.6f}")]
    found = [form.format(result[key]) for key, form in cells if result.get(key) is not None]
    if case.get("floor_ms") and result.get("median_ms") and not name.startswith("("):
        found.append(f"{case['floor_ms'] / result['median_ms']:.0%} of floor")
    memory = result.get("peak_bytes") or result.get("peak_extra_bytes")
    if memory:
        found.append(f"{memory / 2**20:.0f} MB")
    return f"{name}: {', '.join(found)}{' (inexact)' * (result['status'] == 'inexact')}"


def profile(case: dict[str, Any]) -> str:
    """Format a profiled micro-batch."""
    busy = "" if case["busy_ms"] is None else f", busy {case['busy_ms']:.1f}"
    first = case["top"][0]
    return (
        f"{case['name']}, {case['tokens']} tokens: wall {case['wall_ms']:.1f} ms, host {case['host_ms']:.1f}{busy}, "
        f"{case['num_kernels']} kernels; most: {first['ms']:.1f} ms {first['kernel'][:60]}"
    )
