"""DPO loss and its gradient from hidden states and the head, beside every peer.

    python -m bench.bench_pair_loss [--shapes small|issue|gpu] [--only SUBSTRING] [--repeats 15] [--json-dir DIR]
    pytest bench/bench_pair_loss.py --benchmark-json=FILE

The reference policy's log-probs are given to whoever takes them. Liger's fused DPO loss does not: it computes them
from the reference's hidden states inside the call (4 head GEMMs where others do 3), and is timed without a reference
besides, as its best case. Peers of one GEMM floor: a frozen head needs 2, a trainable one 3 (forward, dX, dW).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness.measure import SHORT, Case, Peer, head_ceiling, imported
from bench.harness.options import Spec, bench_one, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.heads import BETA, HeadInputs, describe, dpo, head_inputs, pair_reference, reference_logp
from bench.peers import heads
from macpo.kernels import pair_loss

OURS = "macpo pair_loss"
LIGER = "Liger DPO"
LIGER_FREE = "Liger DPO (reference-free)"
PEERS = (OURS, *heads.per_token(torch.device("cpu")), LIGER, LIGER_FREE)


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    vocab: int
    pairs: int
    prompt: int = 0
    """Prompt rows of each sequence, which Liger's loss takes (and masks) when it is called on whole sequences."""


SHAPES: dict[str, list[tuple[Shape, torch.dtype, str, bool]]] = {
    # (shape, dtype, kind of logits, trainable head)
    "small": [
        (Shape(32, 16, 97, 2, prompt=3), torch.float32, "text", False),
        (Shape(32, 16, 97, 2), torch.bfloat16, "random", True),
    ],
    "issue": [
        (Shape(1024, 512, 32000, 8), torch.float32, "random", False),
        (Shape(1024, 512, 32000, 8), torch.float32, "random", True),
        (Shape(1024, 512, 32000, 8), torch.bfloat16, "random", False),
        (Shape(1024, 512, 32000, 8), torch.bfloat16, "random", True),
        (Shape(256, 512, 32000, 4), torch.float32, "text", False),
    ],
    "gpu": [
        *(
            (Shape(rows, size, 128256, 16), torch.bfloat16, kind, trained)
            for rows, size, kind, trained in (
                *((4096, 4096, kind, trained) for kind in ("random", "text") for trained in (False, True)),
                *((8192, 4096, "text", trained) for trained in (False, True)),
                *((4096, 2048, "text", trained) for trained in (False, True)),
                *((8192, 2048, "text", trained) for trained in (False, True)),
                (2560, 2048, "text", False),
            )
        ),
        # Liger called directly on 16 pairs: 200 prompt and 80 response tokens a sequence.
        (Shape(2560, 4096, 128256, 16, prompt=200), torch.bfloat16, "text", False),
    ],
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [Spec(case_name(*entry), partial(make_case, *entry, device)) for entry in SHAPES[shapes]]


def case_name(shape: Shape, dtype: torch.dtype, kind: str, trained: bool) -> str:
    prompt = f" prompt{shape.prompt}" if shape.prompt else ""
    head = "trainable" if trained else "frozen"
    return f"N{shape.rows} H{shape.hidden} V{shape.vocab} {SHORT[dtype]} {kind} {head}{prompt}"


def make_case(shape: Shape, dtype: torch.dtype, kind: str, trained: bool, device: torch.device) -> Case:
    """Make the inputs and compute their float64 reference."""
    inputs, ref_logps, *references = materials(shape, dtype, kind, device)
    wanted = ("loss", "dhidden", "dweight") if trained else ("loss", "dhidden")
    referred, free = ({name: found[name] for name in wanted} for found in references)
    # Liger gives no log-probs of the sequences.
    reference = {**referred, "logps": reference_logp(inputs).view(inputs.num_sequences, -1).sum(1)}
    inputs.hidden.requires_grad_(True)
    inputs.weight.requires_grad_(trained)
    units = 3 if trained else 2
    unit = 2.0 * shape.rows * shape.hidden * shape.vocab
    peers = [
        Peer(OURS, partial(build_ours, inputs, ref_logps)),
        *(
            Peer(name, partial(build_per_token, inputs, ref_logps, factory))
            for name, factory in heads.per_token(device).items()
        ),
        Peer(
            LIGER,
            partial(build_liger, inputs, shape.prompt, True),
            partial(unpad, inputs, shape.prompt),
            referred,
            note="4u",
        ),
        Peer(LIGER_FREE, partial(build_liger, inputs, 0, False), partial(unpad, inputs, 0), free),
    ]
    return Case(
        case_name(shape, dtype, kind, trained),
        {**vars(shape), "kind": kind, "trainable": trained, **describe(inputs)},
        dtype,
        device,
        peers,
        reference,
        flop=units * unit,
        **head_ceiling(inputs.hidden, inputs.weight, ", one head"),
        unit_work=unit,
    )


@functools.lru_cache(maxsize=1)
def materials(
    shape: Shape, dtype: torch.dtype, kind: str, device: torch.device
) -> tuple[HeadInputs, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return inputs, the reference policy's log-probs, and the float64 results with and without them."""
    inputs = head_inputs(shape.rows, shape.hidden, shape.vocab, kind, dtype, device, shape.pairs)
    logp = reference_logp(inputs, inputs.ref_hidden)
    ref_logps = logp.view(inputs.num_sequences, -1).sum(1).float()
    return inputs, ref_logps, pair_reference(inputs, ref_logps), pair_reference(inputs, None)


def gradients(inputs: HeadInputs, loss: Tensor, hidden: Tensor | None = None) -> Outputs:
    """Return the loss and its gradients."""
    leaves = [inputs.hidden if hidden is None else hidden]
    if inputs.weight.requires_grad:
        leaves.append(inputs.weight)
    grads = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), **dict(zip(("dhidden", "dweight"), grads, strict=False))}


def build_ours(inputs: HeadInputs, ref_logps: Tensor) -> Run:
    def run() -> Outputs:
        result = pair_loss(inputs.hidden, inputs.weight, inputs.target, inputs.cu_rows, ref_logps, beta=BETA)
        logps = torch.stack([result.chosen_logps, result.rejected_logps], dim=1).flatten()
        return {**gradients(inputs, result.loss), "logps": logps}

    return run


def build_per_token(inputs: HeadInputs, ref_logps: Tensor, factory: Callable[[], heads.LogpFn]) -> Run:
    logp_of = factory()

    def run() -> Outputs:
        logp = logp_of(inputs.hidden, inputs.weight, inputs.target)
        logps = logp.detach().view(inputs.num_sequences, -1).sum(1)
        return {**gradients(inputs, dpo(logp, inputs.num_sequences, ref_logps)), "logps": logps}

    return run


def padded(inputs: HeadInputs, rows: Tensor, prompt: int, fill: float) -> Tensor:
    """Pad rows of c0, r0, c1, ... to [2B, prompt + response, ...], chosen first, `fill` where the prompt is."""
    by_sequence = rows.detach().view(inputs.num_sequences, -1, *rows.shape[1:])
    by_sequence = torch.cat([by_sequence[0::2], by_sequence[1::2]])
    front = by_sequence.new_full((inputs.num_sequences, prompt, *rows.shape[1:]), fill)
    return torch.cat([front, by_sequence], dim=1).contiguous()


def build_liger(inputs: HeadInputs, prompt: int, use_ref: bool) -> Run:
    fused = imported("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "Liger does not import")
    loss_of = fused(beta=BETA, use_ref_model=use_ref, compiled=True)
    hidden = padded(inputs, inputs.hidden, prompt, 0.5).requires_grad_()
    ref_hidden = padded(inputs, inputs.ref_hidden, prompt, 0.5)
    target = padded(inputs, inputs.target, prompt, -100)
    ref_weight = inputs.weight.detach()

    def run() -> Outputs:
        reference = (None, ref_hidden, ref_weight) if use_ref else ()
        loss = loss_of(inputs.weight, hidden, target, *reference)[0]
        return gradients(inputs, loss, hidden)

    return run


def unpad(inputs: HeadInputs, prompt: int, outputs: Outputs) -> Outputs:
    """Bring the gradient of the padded hidden states into the packed order."""
    by_sequence = outputs["dhidden"][:, prompt:]
    half = inputs.num_sequences // 2
    packed = torch.stack([by_sequence[:half], by_sequence[half:]], dim=1).reshape(inputs.hidden.shape)
    return {**outputs, "dhidden": packed}


test_pair_loss = bench_one

if __name__ == "__main__":
    run_bench("pair_loss", specs, __doc__ or "")
