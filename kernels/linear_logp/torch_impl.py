"""linear_logp with torch's GEMMs over row chunks: logits of one chunk live at a time, and the gradient is explicit.

For every loss of log-probs, d loss / d logits = g_row * (onehot - softmax): one scalar a row. With u = one head GEMM:
- nothing to differentiate: 1u, nothing kept;
- frozen head: 2u; the forward forms dX for g = 1 and the backward scales its rows;
- trained head, one chunk: 3u; the forward turns the logits into dlogits in place and keeps them;
- trained head, several chunks: 4u; the backward computes each chunk's logits again.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from macpo.kernels.linear_logp import rows

# Logits of a default chunk take at most 128 MiB of float32.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True, slots=True)
class Head:
    """The scalars of a language-model head, and how to compute with it."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    native: bool
    trained: bool  # weight or bias takes gradient
    hidden_takes_grad: bool


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    native: bool = False,
) -> Tensor:
    """hidden [N, H], weight [V, H], target [N] -> [N]; see `op.linear_logp`."""
    tracked = torch.is_grad_enabled()  # inside the Function grad mode is always off
    head = Head(
        logit_scale,
        softcap,
        chunk_rows or max(1, CHUNK_ELEMENTS // weight.shape[0]),
        native,
        trained=tracked and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        hidden_takes_grad=tracked and hidden.requires_grad,
    )
    result: Tensor = _LinearLogp.apply(hidden, weight, bias, target, head)
    return result


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32 (float64 for float64): never through logits rounded to 16 bits."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a.to(dtype), b.to(dtype))


def _logits(hidden_nh: Tensor, weight_vh: Tensor, bias_v: Tensor | None, head: Head) -> Tensor:
    logits_nv = _matmul(hidden_nh, weight_vh.T)
    if bias_v is not None:
        logits_nv += bias_v
    if head.logit_scale != 1.0:
        logits_nv *= head.logit_scale
    if head.softcap is not None:
        logits_nv.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_nv


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        num_rows = hidden.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp_n = torch.empty(num_rows, dtype=dtype, device=hidden.device)
        keep_dx = head.hidden_takes_grad and not head.trained
        keep_dlogits = head.trained and num_rows <= head.chunk_rows
        dx_nh = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if keep_dx else None
        dlogits_nv = None
        for start in range(0, num_rows, head.chunk_rows):
            part = slice(start, start + head.chunk_rows)
            logits_nv = _logits(hidden[part], weight, bias, head)
            logp_n[part], lse_n = rows.logp(logits_nv, target[part], native=head.native)
            if dx_nh is not None or keep_dlogits:
                dlogits_nv = rows.dlogits_(
                    logits_nv, target[part], lse_n, head.logit_scale, head.softcap, native=head.native
                )
            if dx_nh is not None and dlogits_nv is not None:
                dx_nh[part] = _matmul(dlogits_nv.to(weight.dtype), weight)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, target, dx_nh, dlogits_nv if keep_dlogits else None)
        return logp_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, dx_nh, saved_nv = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if dx_nh is not None:
            return (dx_nh * grad_n[:, None]).to(hidden.dtype), None, None, None, None

        head: Head = ctx.head
        num_rows = hidden.shape[0]
        dtype = grad_n.dtype
        dhidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        for start in range(0, num_rows, head.chunk_rows):
            part = slice(start, start + head.chunk_rows)
            if saved_nv is not None:
                dlogits_nv = saved_nv * grad_n[:, None]
            else:
                logits_nv = _logits(hidden[part], weight, bias, head)
                _, lse_n = rows.logp(logits_nv, target[part], native=head.native)
                dlogits_nv = rows.dlogits_(
                    logits_nv, target[part], lse_n, head.logit_scale, head.softcap, native=head.native
                )
                dlogits_nv *= grad_n[part, None]
            low_nv = dlogits_nv.to(weight.dtype)
            if dhidden is not None:
                dhidden[part] = _matmul(low_nv, weight)
            if need_weight:  # summed over chunks in float32
                step_vh = _matmul(low_nv.T, hidden[part])
                dweight = step_vh if dweight is None else dweight.add_(step_vh)
            if need_bias:
                step_v = dlogits_nv.sum(dim=0)
                dbias = step_v if dbias is None else dbias.add_(step_v)
        return (
            None if dhidden is None else dhidden.to(hidden.dtype),
            _like(dweight, weight, need_weight),
            _like(dbias, bias, need_bias),
            None,
            None,
        )


def _like(grad: Tensor | None, leaf: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient in the leaf's dtype; zeros where there was no row at all."""
    if not needed or leaf is None:
        return None
    return torch.zeros_like(leaf) if grad is None else grad.to(leaf.dtype)
