"""Token log-probs from hidden states and the head: scoring, frozen head and trainable head, beside every peer.

    python -m bench.bench_linear_logp [--shapes small|issue|gpu] [--only SUBSTRING] [--repeats 15] [--json-dir DIR]
    pytest bench/bench_linear_logp.py --benchmark-json=FILE

"score" is the forward alone (1 head GEMM). "frozen" and "trainable" add the gradient for a random weight a row, what
a user's own loss asks for (2 and 3 GEMMs). "sum" is the gradient of the summed log-prob, which is all that some peers
can do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness.measure import SHORT, Case, Peer, head_ceiling
from bench.harness.options import Spec, bench_one, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.heads import HeadInputs, describe, head_inputs, reference_gradients, reference_logp
from bench.peers import heads
from macpo.kernels import linear_logp

OURS = "macpo linear_logp"
PEERS = (OURS, *heads.per_token(torch.device("cpu")), *heads.of_sum(torch.device("cpu")))
UNITS = {"score": 1, "frozen": 2, "trainable": 3, "sum": 3}

# Rows, hidden size, vocabulary, dtype, kind of logits, what is asked for.
Entry = tuple[int, int, int, torch.dtype, str, str]
SHAPES: dict[str, list[Entry]] = {
    "small": [
        (24, 16, 97, torch.float32, "text", "score"),
        (24, 16, 97, torch.bfloat16, "text", "trainable"),
        (24, 16, 97, torch.float32, "random", "sum"),
    ],
    "issue": [
        (512, 512, 32000, torch.float32, "text", "score"),
        (512, 512, 32000, torch.bfloat16, "text", "score"),
        (512, 512, 32000, torch.float32, "text", "trainable"),
        (512, 512, 32000, torch.float32, "text", "sum"),
    ],
    "gpu": [
        *(
            (rows, size, 128256, torch.bfloat16, "text", mode)
            for rows, size in ((4096, 4096), (8192, 4096), (4096, 2048), (8192, 2048), (2560, 4096))
            for mode in ("score", "frozen", "trainable")
        ),
        (4096, 4096, 128256, torch.bfloat16, "random", "score"),
        (4096, 4096, 128256, torch.bfloat16, "random", "trainable"),
        (4096, 4096, 128256, torch.bfloat16, "text", "sum"),
    ],
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [Spec(case_name(*entry), partial(make_case, *entry, device)) for entry in SHAPES[shapes]]


def case_name(rows: int, size: int, vocab: int, dtype: torch.dtype, kind: str, mode: str) -> str:
    return f"N{rows} H{size} V{vocab} {SHORT[dtype]} {kind} {mode}"


def make_case(rows: int, size: int, vocab: int, dtype: torch.dtype, kind: str, mode: str, device: torch.device) -> Case:
    """Make the inputs and compute their float64 reference."""
    inputs = head_inputs(rows, size, vocab, kind, dtype, device, num_pairs=rows // 2)
    g = torch.Generator().manual_seed(7)
    grad_n = torch.ones(rows) if mode == "sum" else torch.randn(rows, generator=g)
    grad_n = grad_n.to(device)
    reference: dict[str, Tensor] = {"logp": reference_logp(inputs)}
    if mode != "score":
        reference |= reference_gradients(inputs, grad_n)
    if mode == "frozen":
        del reference["dweight"]
    inputs.hidden.requires_grad_(mode != "score")
    inputs.weight.requires_grad_(mode in ("trainable", "sum"))
    unit = 2.0 * rows * size * vocab
    peers = [Peer(OURS, partial(build, inputs, grad_n, lambda: linear_logp))]
    peers += [Peer(name, partial(build, inputs, grad_n, factory)) for name, factory in heads.per_token(device).items()]
    if mode == "sum":
        summed = {**{k: v for k, v in reference.items() if k != "logp"}, "total": reference["logp"].sum()}
        peers += [
            Peer(name, partial(build_sum, inputs, factory), reference=summed)
            for name, factory in heads.of_sum(device).items()
        ]
    return Case(
        case_name(rows, size, vocab, dtype, kind, mode),
        {"rows": rows, "hidden": size, "vocab": vocab, "kind": kind, "mode": mode, **describe(inputs)},
        dtype,
        device,
        peers,
        reference,
        flop=UNITS[mode] * unit,
        **head_ceiling(inputs.hidden, inputs.weight, ", one head"),
        unit_work=unit,
    )


def leaves(inputs: HeadInputs) -> dict[str, Tensor]:
    """Return the tensors that take a gradient, by the gradient's name."""
    return {name: leaf for name, leaf in (("dhidden", inputs.hidden), ("dweight", inputs.weight)) if leaf.requires_grad}


def build(inputs: HeadInputs, grad_n: Tensor, factory: Callable[[], heads.LogpFn]) -> Run:
    logp_of = factory()
    wanted = leaves(inputs)

    def score() -> Outputs:
        with torch.no_grad():
            return {"logp": logp_of(inputs.hidden, inputs.weight, inputs.target)}

    def run() -> Outputs:
        logp = logp_of(inputs.hidden, inputs.weight, inputs.target)
        grads = torch.autograd.grad(logp, list(wanted.values()), grad_n.to(logp.dtype))
        return {"logp": logp.detach(), **dict(zip(wanted, grads, strict=True))}

    return run if wanted else score


def build_sum(inputs: HeadInputs, factory: Callable[[], heads.SumFn]) -> Run:
    sum_of = factory()
    wanted = leaves(inputs)

    def run() -> Outputs:
        total = sum_of(inputs.hidden, inputs.weight, inputs.target)
        grads = torch.autograd.grad(total, list(wanted.values()))
        return {"total": total.detach(), **dict(zip(wanted, grads, strict=True))}

    return run


test_linear_logp = bench_one

if __name__ == "__main__":
    run_bench("linear_logp", specs, __doc__ or "")
