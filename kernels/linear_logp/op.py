"""linear_logp: token log-probs straight from hidden states and the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from macpo.kernels.backend import explain
from macpo.kernels.linear_logp import torch_impl


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """log softmax(head(hidden))[target], row by row; differentiable in hidden, weight and bias.

    head(h) = softcap * tanh(logit_scale * (h W' + b) / softcap); without softcap, logit_scale * (h W' + b).
    A LoRA on the head is supported by passing the adapted weight, through which autograd goes on.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], dtype of hidden.
        target: [N] int64 in [0, V).
        bias: [V], dtype of hidden.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`.
        chunk_rows: rows whose logits exist at once; default as many as fit 128 MiB.
        backend: force one; default by device (`macpo.kernels.backend`).

    Returns:
        [N] float32 (float64 for float64 inputs), never above 0.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together, a target outside the vocabulary.
        BackendError: the forced backend is not there.
    """
    check_head(hidden, weight, target, bias, logit_scale, softcap)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    choice = explain("linear_logp", hidden.device, backend)
    return torch_impl.linear_logp(
        hidden,
        weight,
        target,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
        native=choice.backend == "native",
    )


def check_head(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> None:
    """Raise ValueError where the inputs of a head operator do not fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], got {target.dtype} {list(target.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive, got {softcap}")
    # On other devices the check would wait for the device; gather asserts there by itself.
    if target.device.type == "cpu" and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"target holds ids {low}..{high}, the head has {weight.shape[0]} rows")
