"""Times launch configurations of the Triton kernels on the GPU that is there: where their committed tables come from.

    python -m bench.tune [--part attention,decode,sample,rows,gemm] [--only SUBSTRING,...] [--jobs 14] [--json FILE]

Nothing is searched at run time; what wins here is written into the kernels' tables by hand. All configurations are
compiled first, by `--jobs` processes side by side. Each trial is then timed inside a CUDA graph: the median of five
stretches. One that does not compile or run is shown with the reason. Results are checked by the operators' tests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.device import copy, gemm, provenance
from bench.harness.measure import finite
from bench.harness.timing import captured
from bench.inputs.attention import AttentionInputs, attention_inputs, hh_like

DEVICE = torch.device("cuda")
VOCAB = 128_256
STRETCHES = 5
STRETCH_MS = 6.0


@dataclass(frozen=True)
class Trial:
    """One configuration on one input."""

    part: str
    case: str
    config: str
    make: Callable[[], Callable[[], Any]]
    """Inputs and settings; returns the call."""
    flop: float = 0.0
    num_bytes: float = 0.0
    ours: bool = True
    """Whether there is a kernel of ours to compile."""


def trials(parts: Sequence[str]) -> list[Trial]:
    made = {"attention": attention, "decode": decode, "sample": sampling, "rows": rows, "gemm": products}
    return [trial for part in parts for trial in made[part]()]


def under(module: Any, values: dict[str, Any], run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` with a module's constants replaced."""
    return mock.patch.multiple(module, **values)(run)


# --- prefix attention ------------------------------------------------------------------------------------------------

ATTENTION = {"hh64": hh_like(64), "8k": [(8192, [512, 512])]}
# (block of queries, of keys, warps, stages)
FORWARD = [
    *((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)),
    *((128, 128, 8, 3), (64, 128, 4, 2), (128, 32, 4, 4), (64, 32, 4, 2)),
]
BACKWARD_DQ = [
    *((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
    *((128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 8, 2)),
]
BACKWARD_DKV = [
    *((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3)),
    *((32, 128, 8, 2), (32, 128, 8, 3), (128, 128, 8, 2), (32, 128, 4, 3)),
]


def attention() -> Iterator[Trial]:
    for (name, groups), size in product(ATTENTION.items(), (128, 64, 256)):
        pairs = attention_inputs(groups, 1, 1, 16, torch.float32, torch.device("cpu")).visible_pairs
        for kernel, configs, factor in (
            ("forward", FORWARD, 4.0),
            ("dq", BACKWARD_DQ, 6.0),
            ("dkv", BACKWARD_DKV, 8.0),
        ):
            for config in configs:
                make = partial(_attention, kernel, name, size, config)
                yield Trial("attention", f"{name} d{size} {kernel}", str(config), make, factor * size * 32 * pairs)


@functools.lru_cache(maxsize=1)
def _attention_inputs(name: str, size: int) -> AttentionInputs:
    return attention_inputs(ATTENTION[name], 32, 8, size, torch.bfloat16, DEVICE)


def _attention(kernel: str, name: str, size: int, config: tuple[int, int, int, int]) -> Callable[[], Any]:
    from macpo.kernels.prefix_attention import plan, triton_impl

    inputs = _attention_inputs(name, size)
    segments, tile, scale = inputs.segments, triton_impl.Tile(*config), size**-0.5
    visible = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, None)
    lists = plan.block_lists(visible, tile.block_q, tile.block_k, by_key=kernel == "dkv")
    q, k, v, do = inputs.q, inputs.k, inputs.v, inputs.grad
    tiles = triton_impl.Tiles(tile, tile, tile)
    if kernel == "forward":
        return lambda: triton_impl.forward(q, k, v, visible, lists, scale, tiles)
    o = torch.randn_like(q)
    lse, delta = (torch.rand(32, q.shape[0], device=DEVICE) * 4 + 8 for _ in range(2))
    if kernel == "dq":
        return lambda: triton_impl.dq_and_delta(do, q, k, v, o, lse, visible, lists, scale, tile)
    return lambda: triton_impl.dk_and_dv(do, q, k, v, lse, delta, visible, lists, scale, tile)


# --- paged decode ----------------------------------------------------------------------------------------------------

DECODE_CASES = [(256, 300), (256, 4096), (32, 4096)]
# (keys a tile, warps, stages, programs a multiprocessor that splits aim at)
DECODE = [
    *((32, 4, 5, 4), (64, 4, 3, 4), (64, 4, 5, 4), (64, 2, 5, 4), (128, 4, 3, 4), (128, 8, 3, 4), (32, 2, 5, 4)),
    *((32, 2, 4, 4), (32, 1, 5, 4), (16, 1, 5, 4), (16, 2, 6, 4), (64, 4, 4, 4), (32, 4, 3, 4), (32, 2, 3, 4)),
    *((32, 2, 7, 4), (64, 4, 4, 8), (32, 2, 5, 8)),
]


def decode() -> Iterator[Trial]:
    for batch, context in DECODE_CASES:
        case, moved = f"B{batch} context {context}", batch * context * 8 * 128 * 2 * 2
        for config in DECODE:
            make = partial(_decode, batch, context, config)
            yield Trial("decode", case, str(config), make, num_bytes=float(moved))
        yield Trial("decode", case, "copy", partial(copy, moved, DEVICE), 0.0, float(moved), False)


def _decode(batch: int, context: int, config: tuple[int, int, int, int]) -> Callable[[], Any]:
    from macpo.kernels.paged_attention import triton_impl

    blocks = -(-context // 32)
    table = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    pools = [torch.randn(batch * blocks, 32, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(batch, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    chosen = triton_impl.Config(*config[:3])
    values = {"config": lambda head_dim, dtype: chosen, "PROGRAMS_PER_SM": config[3]}
    return under(triton_impl, values, lambda: triton_impl.paged_attention(q, *pools, table, lens))


# --- sampling --------------------------------------------------------------------------------------------------------

# tokens a tile of the scan, tokens and registers of a program of it; tile and warps of the draw
SAMPLING = [
    *((256, 14336, 112, 512, 4), (256, 14336, 128, 512, 4), (256, 14336, 96, 512, 4), (256, 10240, 96, 512, 4)),
    *((512, 16384, 128, 512, 4), (512, 16384, 168, 512, 4), (256, 8192, 112, 512, 4), (256, 16384, 112, 512, 4)),
    *((128, 14336, 80, 512, 4), (256, 14336, 112, 512, 2), (256, 14336, 112, 1024, 4), (256, 14336, 112, 512, 8)),
]


def sampling() -> Iterator[Trial]:
    for name, setting in (
        ("temperature", {"temperature": 0.95}),
        ("top-k50 top-p0.7", {"temperature": 0.95, "top_k": 50, "top_p": 0.7}),
    ):
        for config in SAMPLING:
            make = partial(_sampling, setting, config)
            yield Trial("sample", f"B256 {name}", str(config), make, num_bytes=256.0 * VOCAB * 4)
    make = partial(copy, 256 * VOCAB * 4, DEVICE)
    yield Trial("sample", "B256 temperature", "copy", make, 0.0, 256.0 * VOCAB * 4, False)


def _sampling(setting: dict[str, float], config: tuple[int, int, int, int, int]) -> Callable[[], Any]:
    from bench.inputs.heads import head_inputs
    from macpo.kernels import SampleParams
    from macpo.kernels.sampling import triton_impl

    made = head_inputs(256, 256, VOCAB, "text", torch.float32, DEVICE, num_pairs=128)
    logits = made.hidden @ made.weight.T
    params = SampleParams(7, **setting, batch=256, device=DEVICE)  # type: ignore[arg-type]
    index = torch.arange(256, device=DEVICE)
    keys = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=1)
    values = dict(zip(("SCAN_BLOCK", "CHUNK", "SCAN_REGISTERS", "DRAW_BLOCK", "DRAW_WARPS"), config, strict=True))
    return under(triton_impl, values, lambda: triton_impl.sample(logits, params, keys, index))


# --- the head: rows and products -------------------------------------------------------------------------------------

ROWS = [
    *((4, 2048, 16), (2, 2048, 16), (2, 2048, 8), (4, 1024, 8), (2, 1024, 8), (1, 4096, 16), (2, 4096, 16)),
    *((1, 8192, 16), (4, 4096, 32), (1, 4096, 8), (8, 1024, 16)),
]


def rows() -> Iterator[Trial]:
    for num_rows, (kernel, num_bytes) in product((512, 1024), (("logp", 4.0), ("dlogits", 6.0))):
        for config in ROWS:
            make = partial(_rows, num_rows, kernel, config)
            yield Trial("rows", f"{num_rows} rows {kernel}", str(config), make, num_bytes=num_bytes * num_rows * VOCAB)


def _rows(num_rows: int, kernel: str, config: tuple[int, int, int]) -> Callable[[], Any]:
    from macpo.kernels.linear_logp import triton_impl

    z = torch.randn(num_rows, VOCAB, device=DEVICE)  # its own gradient after the first call: the work stays the same
    target = torch.randint(VOCAB, (num_rows,), device=DEVICE)
    block_r, block_c, warps = config
    meta = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    values = {"BLOCK_R": block_r, "BLOCK_C": block_c, "TILE": block_r * block_c, "TILE_META": meta}
    if kernel == "logp":
        return under(triton_impl, values, lambda: triton_impl.row_logp(z, target, None, 1.0, None))
    d = partial(triton_impl.row_logp_dlogits_, z, target, None, 1.0, None, torch.bfloat16)
    return under(triton_impl, values, lambda: d() and None)


# (rows, tokens, depth, warps, stages, blocks of rows together)
GEMM = [
    *((128, 256, 64, 8, 4, 16), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 16), (128, 256, 64, 8, 3, 8)),
    *((256, 128, 64, 8, 3, 8), (128, 128, 64, 4, 3, 16), (128, 256, 64, 8, 3, 32)),
]
PARTS = ("logits", "dx", "dx over logits", "dw", "dw in 16 bits")


def products() -> Iterator[Trial]:
    for hidden, num_rows in product((4096, 2048), (4096, 1024, 768, 512)):
        flop, case = 2.0 * num_rows * hidden * VOCAB, f"H{hidden} N{num_rows}"
        yield Trial("gemm", case, "vendor, scores", partial(_unit, num_rows, hidden), flop, ours=False)
        for name in PARTS:
            if name != "logits" or num_rows < 4096:
                yield Trial("gemm", case, f"vendor, {name}", partial(_vendor, name, num_rows, hidden), flop, ours=False)
        if num_rows in (4096, 1024):
            for config, gradient in product(GEMM, (False, True)):
                make = partial(_epilogue, num_rows, hidden, config, gradient)
                yield Trial("gemm", case + " own" + ", gradient" * gradient, str(config), make, flop)


def _matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def _unit(num_rows: int, hidden: int) -> Callable[[], Any]:
    return gemm(_matrix(num_rows, hidden), _matrix(VOCAB, hidden))


def _vendor(name: str, num_rows: int, hidden: int) -> Callable[[], Any]:
    from macpo.kernels.linear_logp.head import add_product_, product_

    x, w = _matrix(num_rows, hidden), _matrix(VOCAB, hidden)
    if name == "logits":
        z = torch.empty(num_rows, VOCAB, device=DEVICE)
        return lambda: product_(x, w, z)
    # over the front of float32 rows, as the row kernel leaves it, or by itself
    d = _matrix(num_rows, 2 * VOCAB if name == "dx over logits" else VOCAB)[:, :VOCAB]
    if name.startswith("dx"):
        out = torch.empty_like(x)
        return lambda: torch.mm(d, w, out=out)
    dw = torch.zeros(VOCAB, hidden, device=DEVICE, dtype=torch.float32 if name == "dw" else torch.bfloat16)
    return lambda: add_product_(dw, d, x, overwrite=True)


def _epilogue(num_rows: int, hidden: int, config: tuple[int, ...], gradient: bool) -> Callable[[], Any]:
    from macpo.kernels.linear_logp import triton_gemm

    x, w = _matrix(num_rows, hidden), _matrix(VOCAB, hidden)
    target = torch.randint(VOCAB, (num_rows,), device=DEVICE)
    d = torch.empty(num_rows, VOCAB, device=DEVICE, dtype=torch.bfloat16)
    chosen = triton_gemm.GemmConfig(*config)
    run = partial(triton_gemm.gemm_logp, x, w, target, None, 1.0, None)
    if gradient:
        run = partial(triton_gemm.gemm_logp_dlogits, x, w, target, None, 1.0, d)
    return under(triton_gemm, {"choose": lambda *_, **__: chosen}, run)


# --- compiling and timing --------------------------------------------------------------------------------------------


def compile_share(job: tuple[Sequence[str], str, int, int]) -> None:
    """Run every N-th trial once, so that its kernels are in Triton's cache."""
    parts, only, first, step = job
    for trial in chosen_of(parts, only)[first::step]:
        with contextlib.suppress(Exception):
            trial.make()()
            torch.cuda.synchronize()


def chosen_of(parts: Sequence[str], only: str, ours: bool = True) -> list[Trial]:
    kept = only.split(",")
    return [t for t in trials(parts) if any(k in f"{t.case} {t.config}" for k in kept) and (t.ours or not ours)]


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the median time of a call inside a CUDA graph."""
    replay = captured(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stretch(calls: int) -> float:
        begin.record()
        for _ in range(calls):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    stretch(1)
    calls = max(1, int(STRETCH_MS / max(stretch(1), 1e-3)))
    return statistics.median(stretch(calls) for _ in range(STRETCHES))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="attention,decode,sample,rows,gemm")
    parser.add_argument("--only", default="", metavar="SUBSTRING,...", help="trials whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes that compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    parts = args.part.split(",")
    if args.jobs > 1:
        with get_context("spawn").Pool(args.jobs) as pool:
            pool.map(compile_share, [(parts, args.only, first, args.jobs) for first in range(args.jobs)])
    found: list[dict[str, Any]] = []
    for trial in chosen_of(parts, args.only, ours=False):
        row: dict[str, Any] = {"part": trial.part, "case": trial.case, "config": trial.config}
        try:
            row["ms"] = milliseconds(trial.make())
            row["tflop_per_s"], row["gb_per_s"] = (x / row["ms"] / 1e9 for x in (trial.flop, trial.num_bytes * 1e3))
        except Exception as error:
            row["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            torch.cuda.synchronize()
        found.append(row)
    for case in dict.fromkeys((row["part"], row["case"]) for row in found):
        print(f"{case[0]}: {case[1]}")
        mine = [row for row in found if (row["part"], row["case"]) == case]
        for row in sorted(mine, key=lambda row: row.get("ms", float("inf"))):
            if "ms" not in row:
                print(f"  {row['config']:44} {row['problem']}")
                continue
            rate = f"{row['tflop_per_s']:.0f} TF/s" if row["tflop_per_s"] else f"{row['gb_per_s']:.0f} GB/s"
            print(f"  {row['config']:44} {row['ms']:9.4f} ms  {rate}")
    if args.json:
        body = {"bench": "tune", **provenance(DEVICE), "trials": finite(found)}
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
