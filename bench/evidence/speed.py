"""README's table of speeds, from the committed results of the benchmarks on a CPU.

Each row is a peer at its best in the same run: the fastest of those whose results were exact.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.bench_iteration import ratios
from bench.harness.measure import RESULTS

FOLDER = RESULTS / "cpu-amd-epyc-2-threads"


@dataclass(frozen=True)
class Row:
    """How many times faster than a peer we are: median, least and largest of the rounds."""

    what: str
    peer: str
    ratio: float
    spread: tuple[float, float]
    script: str


def _read(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _iterations() -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        found = _read(f"iteration-{dtype}")
        if found:
            values = ratios(found["rounds"], None)
            models = f"{found['student']} student, teachers of {', '.join(found['teachers'])}"
            what = f"a whole round, {dtype} ({models})"
            peer = "`generate`, padded scoring, TRL's DPOTrainer"
            yield Row(what, peer, statistics.median(values), (min(values), max(values)), "bench_iteration")


def _steps(name: str) -> Iterator[Row]:
    """The fastest of TRL's micro-batch sizes; a result that tried one size alone says nothing of TRL at its best."""
    for case in (_read(name) or {"cases": []})["cases"]:
        tried = [r for r in case["results"] if "pairs a forward" in r["rival"] and r["times_ours"]]
        if tried:
            best = min(tried, key=lambda r: r["times_ours"])
            low, high = best["times_ours_quartiles"]
            yield Row(f"a DPO step, {case['name']}", best["rival"], best["times_ours"], (low, high), "bench_train_step")


def _operators(bench: str, what: str, peers: Sequence[str]) -> Iterator[Row]:
    """Cases of a benchmark, each beside the fastest exact peer whose name holds one of `peers`."""
    for case in (_read(bench) or {"cases": []})["cases"]:
        ours = case["results"][0]
        others = [
            r
            for r in case["results"][1:]
            if r["times_ours"] and r["status"] == "exact" and any(name in r["peer"] for name in peers)
        ]
        if others:
            best = min(others, key=lambda r: r["times_ours"])
            low, high = (best["quartiles_ms"][n] / ours["median_ms"] for n in (0, 1))
            script = f"bench_{bench.split('-')[0]}"
            yield Row(f"{what}, {case['name']}", best["peer"], best["times_ours"], (low, high), script)


def rows() -> list[Row]:
    """Every row that has a committed result."""
    return [
        *_iterations(),
        *_steps("train_step"),
        *_steps("train_step-SmolLM2-135M-Instruct-float32"),
        *_steps("train_step-SmolLM2-135M-Instruct-bfloat16"),
        *_operators("generation", "generation", ("generate",)),
        *_operators("generation-SmolLM2-135M-Instruct-float32", "generation", ("generate", "CTranslate2")),
        *_operators("generation-SmolLM2-135M-Instruct-bfloat16", "generation", ("generate", "CTranslate2")),
        *_operators("scoring", "scoring", ("padded",)),
    ]


def markdown(found: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| on two CPU cores | beside | times faster [range] | script |", "|---|---|---|---|"]
    for row in found:
        low, high = row.spread
        lines.append(f"| {row.what} | {row.peer} | {row.ratio:.1f} [{low:.1f}, {high:.1f}] | `bench.{row.script}` |")
    return "\n".join(lines)
