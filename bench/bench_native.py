"""Native CPU kernels against torch's own composition: `python bench/bench_native.py`.

Prints the median time of each and their ratio. An operator keeps its native backend where the ratio is at least 1.3
on realistic sizes; `kernels/backend.py` lists the outcome. (Greedy sampling is below that on small vocabularies, so
`sample` gives greedy batches to torch.) Run `pytest tests/test_kernels_native.py` first: a wrong kernel has no speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from macpo.kernels import SampleParams, native
from macpo.kernels.linear_logp import rows
from macpo.kernels.sampling import torch_impl

# The demo world's word vocabulary, a small BPE, a Llama-2 vocabulary; decode batches of the CPU engine.
VOCABS, BATCHES = (318, 2048, 32000), (16, 64)
SETTINGS = {
    "paper t.95 p.7 k50": {"temperature": 0.95, "top_p": 0.7, "top_k": 50},
    "plain t1": {},
    "nucleus p.9": {"top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def median_us(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median microseconds of each call; they take turns, so that a busy machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if native.module is None:
        raise SystemExit(f"error: {native.why_absent}")
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.repeats}")
    print(f"{'kernel':28}{'B':>5}{'V':>7}{'torch us':>11}{'native us':>11}{'ratio':>7}")
    for batch in BATCHES:
        for vocab in VOCABS:
            compare(batch, vocab, args.repeats)


def compare(batch: int, vocab: int, repeats: int) -> None:
    """Every kernel at one size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab, generator=generator) * 3
    target = torch.randint(vocab, (batch,), generator=generator)
    keys = torch.stack([torch.arange(batch), torch.zeros(batch).long(), torch.zeros(batch).long()], dim=1)
    for name, setting in SETTINGS.items():
        inputs = (logits, SampleParams(7, **setting, batch=batch), keys, torch.arange(batch))
        calls = {"torch": partial(torch_impl.sample, *inputs), "native": partial(native.sample, *inputs)}
        show(f"sample {name}", batch, vocab, median_us(calls, repeats))
    calls = {"torch": partial(rows.torch_logp, logits, target), "native": partial(native.row_logp, logits, target)}
    show("row log-prob", batch, vocab, median_us(calls, repeats))
    # In place: later rounds start from the first one's result, which costs the same.
    _, lse = rows.torch_logp(logits, target)
    calls = {
        "torch": partial(rows.torch_dlogits_, logits.clone(), target, lse, 1.0, None),
        "native": partial(native.row_dlogits_, logits.clone(), target, lse, 1.0, None),
    }
    show("row gradient", batch, vocab, median_us(calls, repeats))


def show(name: str, batch: int, vocab: int, times: dict[str, float]) -> None:
    ratio = times["torch"] / times["native"]
    print(f"{name:28}{batch:5}{vocab:7}{times['torch']:11.0f}{times['native']:11.0f}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
