"""Every way to get token log-probs from hidden states and a head that imports here, for the loss and for scoring.

A peer is a function (hidden, weight, target) -> log-probs [N] that autograd can differentiate; versions are in the
result file. Each factory imports what it needs and raises `Unavailable` with the reason where it cannot run.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.harness.measure import Unavailable, imported, needs_cuda

LogpFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_VOCAB_CHUNK = 32768  # what TRL's trainers pass


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the head as models do: logits in the inputs' dtype, log-softmax in float32."""
    logits_nv = (hidden @ weight.T).float()
    return logits_nv.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


class _Float32Logits(torch.autograd.Function):
    """The head with float32 logits of 16-bit inputs, all in memory: exact, and its gradient's GEMMs in 16 bits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits_nv = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logp_nv = logits_nv.log_softmax(-1)
        ctx.save_for_backward(hidden, weight, target, logp_nv)
        return logp_nv.gather(1, target[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logp_nv = ctx.saved_tensors
        d_nv = logp_nv.exp_().neg_()
        d_nv.scatter_add_(1, target[:, None], torch.ones_like(d_nv[:, :1]))
        d_nv = (d_nv * grads[0][:, None]).to(hidden.dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        return (d_nv @ weight if needs_hidden else None, d_nv.T @ hidden if needs_weight else None, None)


def float32_logits(device: torch.device) -> LogpFn:
    """Return eager code that keeps float32 logits, which is exact."""
    if device.type != "cuda":
        raise Unavailable("torch has 16-bit products with float32 results on CUDA only")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            raise Unavailable("torch eager has float32 logits already")
        logp: Tensor = _Float32Logits.apply(hidden, weight, target)
        return logp

    return run


@functools.cache
def compiled() -> LogpFn:
    return torch.compile(_eager, dynamic=False)


def trl() -> LogpFn:
    """Return TRL's fused head, vocabulary in chunks, without statistics."""
    apply = imported("trl.kernels", "ChunkedLogProbFunction", "TRL's fused head does not import").apply
    options = (1.0, TRL_VOCAB_CHUNK, None, 1.0, ())
    return lambda hidden, weight, target: apply(hidden, weight, None, target, *options)[0]


def _cce(device: torch.device, **options: Any) -> LogpFn:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cce = imported("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy does not import")
    if options["impl"] == "cce":
        needs_cuda(device, "Triton kernels")
    return lambda hidden, weight, target: -cce(hidden, weight, target, reduction="none", **options)


def _liger_flce(device: torch.device, reduction: str) -> LogpFn:
    """Liger's Triton fused linear cross entropy; float32 weight gradient."""
    name = "LigerFusedLinearCrossEntropyFunction"
    apply = imported("liger_kernel.ops.fused_linear_cross_entropy", name, "Liger does not import").apply
    needs_cuda(device, "Triton kernels")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = apply(hidden, weight, target, None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)
        return -(out[0] if isinstance(out, tuple) else out)

    return run


def liger_scaled() -> LogpFn:
    """Liger's fused scaled cross entropy: CuTe kernels on sm_90, 512-row chunks of torch elsewhere."""
    name = "LigerFusedLinearScaledCrossEntropyFunction"
    apply = imported("liger_kernel.ops.fused_linear_scaled_cross_entropy", name, "Liger does not import").apply
    return lambda hidden, weight, target: -apply(hidden, weight, target)


def per_token(device: torch.device) -> dict[str, Callable[[], LogpFn]]:
    """Return the peers, without ours, that give a log-prob and take a gradient per token, by name."""
    return {
        "torch eager": lambda: _eager,
        "torch eager, float32 logits": partial(float32_logits, device),
        "torch.compile": compiled,
        "TRL fused head": trl,
        "Liger FLCE (per token)": partial(_liger_flce, device, "none"),
        "Liger scaled CE": liger_scaled,
        "cut-cross-entropy (exact)": partial(_cce, device, impl="cce", filter_eps=None),
        "cut-cross-entropy (filtered)": partial(_cce, device, impl="cce", filter_eps="high"),
        "cut-cross-entropy (torch_compile)": partial(_cce, device, impl="torch_compile"),
    }


# --- peers whose gradient can only be that of the sum ----------------------------------------------------------------

SumFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # -> sum of log-probs, a scalar


def torch_chunked_sum() -> SumFn:
    """torch's own F.linear_cross_entropy in chunks (its gradient is formed in the forward)."""
    loss: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if loss is None:
        raise Unavailable("this torch has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: -loss(hidden, weight, target, reduction="sum", options=options)


def quack_sum(device: torch.device) -> SumFn:
    needs_cuda(device, "CuTe kernels")
    loss = imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy", "quack does not import")
    return lambda hidden, weight, target: -loss(hidden, weight, target, reduction="sum")


def of_sum(device: torch.device) -> dict[str, Callable[[], SumFn]]:
    """Return the peers that give a summed loss only."""
    return {
        "torch F.linear_cross_entropy (sum only)": torch_chunked_sum,
        "Liger FLCE (sum only)": partial(_liger_flce, device, "sum"),
        "quack (sum only)": partial(quack_sum, device),
    }
