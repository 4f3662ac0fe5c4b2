"""Every way to get token log-probs from hidden states and a head that imports here, for the loss and for scoring.

A peer is a function (hidden, weight, target) -> log-probs [N] that autograd can differentiate; versions are in the
result file. Each factory imports what it needs and raises `Unavailable` with the reason where it cannot run.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.harness.measure import Unavailable
from macpo.kernels import linear_logp

LogpFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_VOCAB_CHUNK = 32768  # what TRL's trainers pass


def ours() -> LogpFn:
    return linear_logp


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the head as models do: logits in the inputs' dtype, log-softmax in float32."""
    logits_nv = (hidden @ weight.T).float()
    return logits_nv.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def eager() -> LogpFn:
    return _eager


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
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(f"TRL's fused head does not import: {error}") from error

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logp: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ())[
            0
        ]
        return logp

    return run


def _cce(device: torch.device, **options: Any) -> LogpFn:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"cut-cross-entropy does not import: {error}") from error
    if device.type != "cuda" and options["impl"] == "cce":
        raise Unavailable("its Triton kernels are for CUDA tensors")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, target, reduction="none", **options)

    return run


def cce_filtered(device: torch.device) -> LogpFn:
    return _cce(device, impl="cce", filter_eps="high")


def cce_exact(device: torch.device) -> LogpFn:
    return _cce(device, impl="cce", filter_eps=None)


def cce_torch(device: torch.device) -> LogpFn:
    return _cce(device, impl="torch_compile")


def liger_flce(device: torch.device) -> LogpFn:
    """Liger's Triton fused linear cross entropy, per token; float32 weight gradient."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"Liger does not import: {error}") from error
    if device.type != "cuda":
        raise Unavailable("its Triton kernels are for CUDA tensors")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, target, None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
        )
        return -(out[0] if isinstance(out, tuple) else out)

    return run


def liger_scaled() -> LogpFn:
    """Liger's fused scaled cross entropy: CuTe kernels on sm_90, 512-row chunks of torch elsewhere."""
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"Liger does not import: {error}") from error

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)

    return run


# --- peers whose gradient can only be that of the sum ----------------------------------------------------------------

SumFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # -> sum of log-probs, a scalar


def torch_chunked_sum() -> SumFn:
    """torch's own F.linear_cross_entropy in chunks (its gradient is formed in the forward)."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Unavailable("this torch has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)

    return run


def quack_sum(device: torch.device) -> SumFn:
    if device.type != "cuda":
        raise Unavailable("its CuTe kernels are for CUDA tensors")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"quack does not import: {error}") from error

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -chunked_linear_cross_entropy(hidden, weight, target, reduction="sum")

    return run


def liger_flce_sum(device: torch.device) -> SumFn:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"Liger does not import: {error}") from error
    if device.type != "cuda":
        raise Unavailable("its Triton kernels are for CUDA tensors")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, target, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
        )
        return -(out[0] if isinstance(out, tuple) else out)

    return run


def per_token(device: torch.device) -> dict[str, Callable[[], LogpFn]]:
    """Return the peers, without ours, that give a log-prob and take a gradient per token, by name."""
    return {
        "torch eager": eager,
        "torch eager, float32 logits": functools.partial(float32_logits, device),
        "torch.compile": compiled,
        "TRL fused head": trl,
        "Liger FLCE (per token)": functools.partial(liger_flce, device),
        "Liger scaled CE": liger_scaled,
        "cut-cross-entropy (exact)": functools.partial(cce_exact, device),
        "cut-cross-entropy (filtered)": functools.partial(cce_filtered, device),
        "cut-cross-entropy (torch_compile)": functools.partial(cce_torch, device),
    }


def of_sum(device: torch.device) -> dict[str, Callable[[], SumFn]]:
    """Return the peers that give a summed loss only."""
    return {
        "torch F.linear_cross_entropy (sum only)": torch_chunked_sum,
        "Liger FLCE (sum only)": functools.partial(liger_flce_sum, device),
        "quack (sum only)": functools.partial(quack_sum, device),
    }
