"""Native CPU kernels beside torch's own composition: `python -m bench.bench_native [--json PATH] [--only NAME]`.

Each kernel runs at its real sizes with 1 and 2 threads, beside what torch offers for the same result, both from the
same inputs, and both are compared with float64 first. Kernel and composition take turns; the ratio is of medians.
An operator keeps its native backend where the ratio is at least 1.3 (`kernels/backend.py` lists the outcome). Greedy
sampling is below that on small vocabularies, so `sample` gives greedy batches to torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.harness.device import default_device, provenance
from bench.harness.measure import SHORT
from macpo.engine.generation.slots.packed_linear import onednn_pack, onednn_product
from macpo.kernels import SampleParams, native
from macpo.kernels.linear_logp import rows_torch
from macpo.kernels.paged_attention.slots import masked_slot_attention, slot_attention, slot_mask
from macpo.kernels.sampling import torch_impl

# Decode batches of the CPU engine; the demo world's word vocabulary, a small BPE, a Llama-2 vocabulary.
BATCHES, VOCABS = (16, 64), (318, 2048, 32000)
SETTINGS: dict[str, dict[str, float]] = {
    "paper t.95 p.7 k50": {"temperature": 0.95, "top_p": 0.7, "top_k": 50},
    "plain t1": {},
    "nucleus p.9": {"top_p": 0.9},
    "greedy": {"temperature": 0.0},
}
# Rows and vocabulary of a chunk of the loss.
CHUNKS = ((1024, 318), (256, 2048), (128, 32000))
# Rows and hidden size of the head's products; the vocabulary is 32,000.
PRODUCTS = ((128, 512), (256, 512), (384, 512), (128, 2048), (384, 2048))
# Heads, kv heads, head size, shortest and longest context: the demo's models, the local recipe's, a small Llama.
CACHES = ((4, 4, 20, 50, 96), (4, 4, 32, 50, 96), (4, 4, 40, 100, 256), (8, 8, 64, 300, 600), (8, 2, 64, 300, 600))
# Outputs and inputs of a 15M Llama's layers and head, and of a larger layer; rows of a decode step.
LAYERS_OF_MODELS, ROWS = ((288, 288), (768, 288), (288, 768), (32000, 288), (2048, 2048)), (1, 4, 16, 64)
WEIGHT_BYTES = 60 << 20
LAYERS = 4  # caches that take turns, so that none stays in the processor's
# Relative error against float64 (Euclidean norm) up to which a result counts.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Results = Sequence[Tensor]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Pair:
    """A kernel and torch's composition of the same result."""

    name: str
    size: str
    kernel: Call
    composition: Call
    expected: Results | None
    """Expected results in float64; None for samplers, whose tokens must be equal."""
    dtype: torch.dtype = torch.float32
    before: Callable[[], object] = lambda: None
    """Runs untimed before each call and restores what an in-place call has changed."""
    rounds: int = 0
    """Pairs of calls; 0: as asked for on the command line."""


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampling() -> Iterator[Pair]:
    for batch in BATCHES:
        for vocab in VOCABS:
            logits, index = seeded(batch, vocab) * 3, torch.arange(batch)
            keys = torch.stack([index, index * 0, index * 0], dim=1)
            for name, setting in SETTINGS.items():
                inputs = (logits, SampleParams(7, **setting, batch=batch), keys, index)  # type: ignore[arg-type]
                calls = called(native.sample, *inputs), called(torch_impl.sample, *inputs)
                yield Pair(f"sample {name}", f"{batch} x {vocab}", *calls, None)


def called(function: Callable[..., Any], *args: object) -> Call:
    """Wrap a call so that it returns a tuple."""

    def run() -> Results:
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    return run


def restored(start: Tensor, *copies: Tensor) -> Callable[[], object]:
    return lambda: [copy.copy_(start) for copy in copies]


def row_kernels() -> Iterator[Pair]:
    """Yield the row kernels. Torch's composition gets row-major products, on which it is fastest."""
    for rows, vocab in CHUNKS:
        start, target = seeded(rows, vocab) * 3, torch.arange(rows) * 7 % vocab
        size, z = f"{rows} x {vocab}", start.clone()
        for softcap in (None, 30.0):
            head = (target, None, 1.0, softcap)
            exact = rows_torch.row_logp_dlogits_(start.double(), *head, torch.float64)
            known = (target, exact[1].float(), None, 1.0, softcap)
            for layout, own in (("rows", start.clone()), ("lanes", start.T.contiguous().T)):
                name, before = layout if softcap is None else f"{layout} softcap", restored(start, own, z)
                calls = called(native.row_logp, own, *head), called(rows_torch.row_logp, z, *head)
                yield Pair(f"logp {name}", size, *calls, exact[:2], before=before)
                for dtype in EXACT:
                    calls = (
                        called(native.row_logp_dlogits_, own, *head, dtype),
                        called(rows_torch.row_logp_dlogits_, z, *head, dtype),
                    )
                    yield Pair(f"logp, d {SHORT[dtype]} {name}", size, *calls, exact, dtype, before)
                    calls = (
                        called(native.row_dlogits_, own, *known, dtype),
                        called(rows_torch.row_dlogits_, z, *known, dtype),
                    )
                    yield Pair(f"d {SHORT[dtype]} {name}", size, *calls, exact[2:], dtype, before)


def float32_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.float(), b.float())


def float32_addmm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addmm_(a.float(), b.float())


def products() -> Iterator[Pair]:
    if not native.has_bf16_gemm():
        print("bf16 products: this CPU lacks AVX512-BF16, torch runs")
        return
    vocab = 32000
    for rows, size in PRODUCTS:
        hidden, weight = seeded(rows, size).bfloat16(), (seeded(vocab, size, seed=1) * size**-0.5).bfloat16()
        shape = f"{rows} x {size} x {vocab}"
        exact = (hidden.double() @ weight.double().T,)
        ours = called(native.bf16_logits, hidden, weight)
        yield Pair("bf16_logits : fp32 mm", shape, ours, called(float32_mm, hidden, weight.T), exact, rounds=5)
        # Its result is rounded to bf16: no substitute for logits, but the speed that the vendor's library reaches.
        rounded = called(torch.mm, hidden, weight.T)
        yield Pair("bf16_logits : bf16 mm", shape, ours, rounded, exact, torch.bfloat16, rounds=9)
        d, start = exact[0].T.bfloat16().contiguous(), seeded(vocab, size, seed=2)
        mine, other = start.clone(), start.clone()
        calls = called(native.bf16_accumulate_, mine, d, hidden), called(float32_addmm_, other, d, hidden)
        total = (start.double() + d.double() @ hidden.double(),)
        yield Pair("bf16_accumulate_", shape, *calls, total, before=restored(start, mine, other), rounds=5)


def all_of(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(product(x) for product in products)


def panels() -> Iterator[Pair]:
    """Yield panel products. Weights take turns until they fill WEIGHT_BYTES: they come from memory, as in decoding."""
    if not native.has_panels():
        print("panels: this CPU lacks AVX-512, oneDNN's packed product runs")
        return
    for outputs, width in LAYERS_OF_MODELS:
        count = max(1, WEIGHT_BYTES // (4 * outputs * width))
        weights = [seeded(outputs, width, seed=i) for i in range(count)]
        ours = [native.Panels(weight).product for weight in weights]
        packed = [partial(onednn_product, onednn_pack(weight), None) for weight in weights]
        plain = [partial(functional.linear, weight=weight) for weight in weights]
        for rows in ROWS:
            x, shape = seeded(rows, width, seed=-1), f"{rows} x {width} x {outputs}"
            exact = [x.double() @ weight.double().T for weight in weights]
            for name, theirs in (("packed by oneDNN", packed), ("plain", plain)):
                calls = called(all_of, ours, x), called(all_of, theirs, x)
                yield Pair(f"panels : {name}", shape, *calls, exact)


Caches = Sequence[tuple[Tensor, Tensor]]


def all_layers(q: Tensor, caches: Caches, lens: Tensor) -> tuple[Tensor, ...]:
    return tuple(slot_attention(q, k, v, lens, backend="native") for k, v in caches)


def all_layers_torch(q: Tensor, caches: Caches, mask: Tensor, scale: float) -> tuple[Tensor, ...]:
    return tuple(masked_slot_attention(q, k, v, mask, scale) for k, v in caches)


def decode() -> Iterator[Pair]:
    for batch in BATCHES:
        for heads, kv_heads, size, shortest, longest in CACHES:
            slot_tokens = -(-longest // 32) * 32
            q = seeded(batch, heads, size)
            cache = partial(seeded, batch, kv_heads, slot_tokens, size)
            caches = [(cache(seed=i), cache(seed=-i)) for i in range(1, LAYERS + 1)]
            lens = shortest + torch.arange(batch) * 37 % (longest - shortest + 1)
            mask = slot_mask(lens, torch.arange(int(lens.max())), None, torch.float32, kv_heads)
            double = slot_mask(lens, torch.arange(int(lens.max())), None, torch.float64, kv_heads)
            exact = [masked_slot_attention(q.double(), k.double(), v.double(), double, size**-0.5) for k, v in caches]

            calls = called(all_layers, q, caches, lens), called(all_layers_torch, q, caches, mask, size**-0.5)
            shape = f"{batch} x {heads}/{kv_heads} x {size}, {shortest}-{longest}"
            yield Pair("slot_attention", shape, *calls, exact)


GROUPS: dict[str, Callable[[], Iterator[Pair]]] = {
    "sample": sampling, "rows": row_kernels, "products": products, "panels": panels, "slots": decode,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One pair with one number of threads. Times in microseconds: median, lower and upper quartile, minimum."""

    name: str
    size: str
    threads: int
    error: float
    native_us: tuple[float, ...]
    torch_us: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return self.torch_us[0] / self.native_us[0]

    @property
    def ratio_of_minima(self) -> float:
        """Ratio of the fastest calls, which other work on the machine disturbs least."""
        return self.torch_us[3] / self.native_us[3]


def check(pair: Pair) -> float:
    """Return the kernel's largest relative error; exit where kernel or composition is wrong."""
    pair.before()
    ours, theirs = pair.kernel(), pair.composition()
    if pair.expected is None:
        if not torch.equal(ours[0], theirs[0]):
            raise SystemExit(f"error: {pair.name}, {pair.size}: kernel and composition draw different tokens")
        return max(relative_error(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    errors = []
    for who, got in (("kernel", ours), ("composition", theirs)):
        errors.append(max(relative_error(a, b) for a, b in zip(got, pair.expected, strict=True)))
        if not errors[-1] <= EXACT[pair.dtype]:
            raise SystemExit(f"error: {pair.name}, {pair.size}: the {who} is wrong by {errors[-1]:.1e}")
    return errors[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / (expected.double().norm() or 1.0)).item()


def measure(pair: Pair, threads: int, rounds: int) -> Row:
    error = check(pair)
    taken: dict[str, list[float]] = {"native": [], "torch": []}
    for _ in range(pair.rounds or rounds):
        for name, call in (("native", pair.kernel), ("torch", pair.composition)):
            pair.before()
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e6)
    return Row(pair.name, pair.size, threads, error, spread(taken["native"]), spread(taken["torch"]))


def spread(times: list[float]) -> tuple[float, ...]:
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), low, high, min(times)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if native.module is None:
        raise SystemExit(f"error: {native.why_absent}")
    print(f"torch {torch.__version__}; medians of up to {args.rounds} rounds, spread: quartiles over the median")
    print(
        f"{'kernel':28}{'size':>26}{'threads':>8}{'torch us':>11}{'native us':>11}{'spread':>8}{'ratio':>7}"
        f"{'of minima':>10}{'error':>9}"
    )
    rows = []
    for group in args.only:
        for pair in GROUPS[group]():
            for threads in args.threads:
                torch.set_num_threads(threads)
                rows.append(row := measure(pair, threads, args.rounds))
                middle, low, high, _ = row.native_us
                print(
                    f"{row.name:28}{row.size:>26}{threads:8}{row.torch_us[0]:11.0f}{middle:11.0f}"
                    f"{(high - low) / middle:8.0%}{row.ratio:7.2f}{row.ratio_of_minima:10.2f}{row.error:9.1e}",
                    flush=True,
                )
    if args.json:
        facts: dict[str, Any] = provenance(default_device())
        facts["results"] = [{**asdict(row), "ratio": row.ratio, "ratio_of_minima": row.ratio_of_minima} for row in rows]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
