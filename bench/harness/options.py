"""The command line and the pytest side of every benchmark script."""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bench.harness.device import default_device, device_name, synchronise
from bench.harness.measure import LEGEND, Case, entry, measure, prepare, save, table

SHAPES = ("small", "issue", "gpu")


@dataclass(frozen=True)
class Spec:
    """A case that is made when it is measured, so that only one case's tensors exist at a time."""

    name: str
    make: Callable[[], Case]


Specs: TypeAlias = Callable[[str, torch.device], list[Spec]]


def default_shapes(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else "issue"


def prepare_torch() -> None:
    """Keep compiled peers, which see many shapes in one process, from falling back to eager after eight."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024


def run_bench(
    bench: str,
    specs: Specs,
    about: str,
    argv: Sequence[str] | None = None,
    pretrained: Callable[[str, torch.dtype, torch.device], Spec] | None = None,
) -> Path:
    """Parse, measure every case, print its lines, write the JSON; return its path.

    With `pretrained` a model can be named instead of the shapes; its result has a file of its own.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--shapes", choices=SHAPES, help="default: gpu on a GPU, else issue")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all cases; those left over are named")
    parser.add_argument("--only", default="", metavar="SUBSTRING,...", help="cases whose name holds one of these")
    parser.add_argument("--peers", metavar="NAME,...", help="besides ours only peers whose name holds one of these")
    parser.add_argument("--json-dir", type=Path, help="folder of the result; default bench/results/<device>")
    if pretrained:
        parser.add_argument("--model", help="a folder or Hub id, instead of the shapes")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --model")
    args = parser.parse_args(argv)
    shapes = args.shapes or default_shapes(args.device)
    prepare_torch()
    cases = specs(shapes, args.device)
    if pretrained and args.model:
        cases = [pretrained(args.model, getattr(torch, args.dtype), args.device)]
        bench = f"{bench}-{Path(args.model).name}-{args.dtype}"
    todo = [spec for spec in cases if any(part in spec.name for part in args.only.split(","))]
    if not todo:
        parser.error(f"no case fits --only {args.only!r}")
    print(f"{bench}: {device_name(args.device)}, torch {torch.__version__}\n{LEGEND}", flush=True)
    done: list[dict[str, Any]] = []
    end = time.monotonic() + args.seconds
    skipped: list[str] = []
    failed: list[str] = []
    for number, spec in enumerate(todo):
        left = end - time.monotonic()
        if left < 0:
            skipped.append(spec.name)
            print(f"{spec.name}: not run, --seconds {args.seconds:.0f} were over", flush=True)
            continue
        try:
            done.append(measure_one(spec, args.peers, args.repeats, end, left / (len(todo) - number)))
        except Exception:  # out of memory, say: the cases after it still count
            traceback.print_exc()
            failed.append(spec.name)
        gc.collect()
        save(bench, done, [spec.name for spec in todo[number + 1 :]], args.device, args.json_dir)  # if it is stopped
    path = save(bench, done, skipped + failed, args.device, args.json_dir)
    if failed:
        raise SystemExit(f"error: {', '.join(failed)}: see above")
    print(f"written: {path}", flush=True)
    return path


def measure_one(spec: Spec, peers: str | None, repeats: int, end: float, share: float) -> dict[str, Any]:
    """Make and measure a case in `share` seconds, `end` being when all have to be done; print and return its entry."""
    begin = time.monotonic()
    case = spec.make()
    if peers:
        wanted = peers.split(",")
        case.peers = [p for p in case.peers if p is case.peers[0] or any(part in p.name for part in wanted)]
    made = time.monotonic()  # what its reference took is spent
    results = measure(case, repeats, share - (made - begin), check_s=(end - made) / 4)
    print("\n".join(table(case, results)), flush=True)
    return entry(case, results)


_current: dict[str, Case] = {}


def bench_one(benchmark: Any, spec: Spec, peer_name: str) -> None:
    """Run pytest-benchmark on one peer and case after a check; a wrong or absent peer is skipped, ours fails."""
    import pytest

    if spec.name not in _current:
        _current.clear()
        gc.collect()
        prepare_torch()
        _current[spec.name] = spec.make()
    case = _current[spec.name]
    peer = next((peer for peer in case.peers if peer.name == peer_name), None)
    if peer is None:
        pytest.skip(f"no {peer_name} in this case")
    result, run = prepare(case, peer)
    if run is None:
        verdict = f"{peer_name}: {result.status}: {result.reason}"
        if peer is case.peers[0]:
            pytest.fail(verdict)
        pytest.skip(verdict)
    benchmark.extra_info.update(case=spec.name, shape=case.shape, errors=result.errors, status=result.status)
    benchmark.pedantic(lambda: (run(), synchronise(case.device)), warmup_rounds=1, rounds=5)
