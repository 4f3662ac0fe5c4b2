"""linear_logp as a torch custom operator with a fake implementation and a backward, so that it compiles whole.

Custom operators return tensors only: what is not there is a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from macpo.kernels.linear_logp import chunked
from macpo.kernels.linear_logp.head import Gradients, Head, Needs
from macpo.kernels.linear_logp.scaling import scale_rows


@torch.library.custom_op("macpo::linear_logp", mutates_args=())
def linear_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, target: Tensor,
    lora_scaling: float, scale: float, softcap: float | None, chunk_rows: int, backend: str, needs: Sequence[bool],
    route: str = "vendor",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs [N], and for the backward: logsumexps [N], d W [N, H], d [N, V] ([V, N] where z is transposed), and the
    factors of its rows [N].

    Raises:
        ValueError: a target outside the vocabulary, on the CPU.
    """
    check_target(target, weight.shape[0])
    head = Head(weight, bias, lora_a, lora_b, lora_scaling, scale, softcap, backend, route)
    logp_n, lse_n, dx_nh, d_nv, factor_n = chunked.forward(head, hidden, target, chunk_rows, Needs(*needs))
    kept = None if d_nv is None else (d_nv.T if head.transposed(hidden.shape[0]) else d_nv).contiguous()
    return logp_n, lse_n, or_empty(dx_nh, hidden), or_empty(kept, hidden), or_empty(factor_n, lse_n)


@linear_logp.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias, lora_a, lora_b, _, lora_scaling, scale, softcap, chunk_rows, backend, needs, *route = args
    head = Head(weight, bias, lora_a, lora_b, lora_scaling, scale, softcap, backend)
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    keep_dx, keep_d = chunked.keeps(head, Needs(*needs), num_rows, chunk_rows)
    kept_shape = (vocab, num_rows) if head.transposed(num_rows) else (num_rows, vocab)
    return (
        hidden.new_empty(num_rows, dtype=head.dtype),
        hidden.new_empty(num_rows, dtype=head.dtype),
        hidden.new_empty(hidden.shape if keep_dx else (0,)),
        hidden.new_empty(kept_shape if keep_d else (0,)),
        hidden.new_empty(num_rows if route == ["epilogue"] and (keep_dx or keep_d) else 0, dtype=head.dtype),
    )


@torch.library.custom_op("macpo::linear_logp_backward", mutates_args=())
def linear_logp_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    target: Tensor, lse: Tensor, dx: Tensor, kept: Tensor, factor: Tensor, lora_scaling: float, scale: float,
    softcap: float | None,    chunk_rows: int, backend: str, needs: Sequence[bool], route: str = "vendor",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight, bias and the LoRA's factors from grad [N] = d loss / d logp."""
    head = Head(weight, bias, lora_a, lora_b, lora_scaling, scale, softcap, backend, route)
    wanted = Needs(*needs)
    if not wanted.head and wanted.hidden:
        empties = (weight.new_empty(0) for _ in range(4))
        return (scale_rows(dx, grad * factor if factor.numel() else grad), *empties)  # type: ignore[return-value]
    d_nv = (kept.T if head.transposed(hidden.shape[0]) else kept) if kept.numel() else None
    factor_n = factor if factor.numel() else None
    grads = chunked.backward(head, hidden, target, lse, d_nv, grad, wanted, chunk_rows, factor_n)
    return as_outputs(grads, hidden)


@linear_logp_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return fake_gradients(args[1:6], args[16])


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def as_outputs(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in their inputs' dtypes; empty ones where there is none."""
    dtype = grads.head.weight_vh.dtype
    sums = (grads.weight, grads.bias, grads.lora_a, grads.lora_b)
    weight, bias, lora_a, lora_b = (or_empty(None if x is None else x.to(dtype), like) for x in sums)
    return or_empty(grads.hidden, like), weight, bias, lora_a, lora_b


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors shaped as the gradients of hidden, weight, bias and the LoRA's factors."""
    hidden = inputs[0]
    assert hidden is not None
    shapes = ((0,) if x is None or not needed else x.shape for x, needed in zip(inputs, needs, strict=True))
    return tuple(hidden.new_empty(shape) for shape in shapes)


def or_none(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def check_target(target: Tensor, vocab: int) -> None:
    """Raise ValueError for a target outside the vocabulary; on the CPU only, not to wait for a device."""
    if target.device.type == "cpu" and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(f"target holds ids {low}..{high}, the head has {vocab} rows")


def refuse_double_backward(op: str) -> None:
    """Gradients are explicit formulas without formulas of their own; create_graph=True asks for these."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative; call backward without create_graph=True")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, lora_a, lora_b, target, *ctx.scalars, needs, ctx.route = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.needs = list(needs)
    ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, target, *kept)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_logp")
    rest = [None] * 8
    if grad is None:
        return (None,) * 5 + tuple(rest)
    grads = linear_logp_backward(grad, *ctx.saved_tensors, *ctx.scalars, ctx.needs, ctx.route)
    return (*or_none(grads, ctx.needs), *rest)


linear_logp.register_autograd(_backward, setup_context=_setup)
