"""pair_loss as a torch custom operator: its gradients are formed in the forward, and the backward scales them.

Custom operators return tensors only: what is not there is a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from macpo.kernels.linear_logp.head import Head, Needs
from macpo.kernels.linear_logp.library import (
    as_outputs,
    check_target,
    fake_gradients,
    or_empty,
    or_none,
    refuse_double_backward,
)
from macpo.kernels.linear_logp.scaling import scale_, scale_rows, with_dimension
from macpo.kernels.pair_loss import chunked
from macpo.kernels.pair_loss.losses import LossSettings

# loss, sft_loss, logps, rewards; g of the rows, size of one unit in the head's gradients; gradients of
# hidden, weight, bias and the LoRA's factors.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("macpo::pair_loss", mutates_args=())
def pair_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, target: Tensor,
    cu_rows: Tensor, ref_logps: Tensor | None, loss: str, beta: float, label_smoothing: float, gamma: float | None,
    ld_alpha: float | None, sft_weight: float, num_pairs: int, lora_scaling: float, scale: float, softcap: float | None,
    chunk_rows: int, backend: str, needs: Sequence[bool], route: str = "vendor",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `Outputs` and `chunked.Result`.

    Raises:
        ValueError: cu_rows that do not grow from 0 to N, or a target outside the vocabulary, on the CPU.
    """
    bounds = chunked.check_bounds(cu_rows, hidden.shape[0])
    check_target(target, weight.shape[0])
    head = Head(weight, bias, lora_a, lora_b, lora_scaling, scale, softcap, backend, route)
    settings = LossSettings(loss, beta, label_smoothing, gamma, ld_alpha, sft_weight)
    pairs = chunked.Pairs(bounds, ref_logps, settings, num_pairs, hidden.new_empty(0, dtype=head.dtype))
    return outputs_of(chunked.pair_loss(head, hidden, target, pairs, Needs(*needs), chunk_rows), hidden)


@pair_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    (hidden, weight, *_), cu_rows, needs = args, args[6], args[20]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    num_sequences, num_grads = cu_rows.shape[0] - 1, hidden.shape[0] if Needs(*needs).any else 0
    shapes = (), (), (num_sequences,), (num_sequences,), (num_grads,), ()
    return *(hidden.new_empty(shape, dtype=dtype) for shape in shapes), *fake_gradients(args[:5], needs)


def outputs_of(out: chunked.Result, hidden: Tensor) -> Outputs:
    unit = out.loss.new_full((), 1 / out.grad_scale)
    grads = as_outputs(out.grads, hidden)
    return (out.loss, out.sft_loss, out.logps, out.rewards, or_empty(out.grad_n, out.loss), unit, *grads)


def keep(ctx: Any, needs: Sequence[bool], output: Outputs) -> None:
    """Save what `input_gradients` needs from the forward."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs = list(needs)
    ctx.save_for_backward(*output[4:])


def input_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and the LoRA's factors from that of the loss."""
    refuse_double_backward("pair_loss")
    if grad is None:
        return (None,) * 5
    grad_n, unit, hidden, *sums = ctx.saved_tensors
    # Scaled in place where this is the only backward, so that large gradients exist once.
    once = type(hidden) is Tensor and not torch.compiler.is_compiling() and not _graph_is_kept()
    dhidden = scale_rows(hidden, grad_n * grad, in_place=once and hidden.is_cuda) if ctx.needs[0] else None
    scaled = [scale_(x, grad * unit) if once else (x * with_dimension(grad * unit, x)).to(x.dtype) for x in sums]
    return dhidden, *or_none(scaled, ctx.needs[1:])


def _graph_is_kept() -> bool:
    """Whether this backward was called with retain_graph=True, so that what it saved must stay as it is."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # not a public function
        return True


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    keep(ctx, inputs[-2], output)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return *input_gradients(ctx, grad), *[None] * 17


pair_loss.register_autograd(_backward, setup_context=_setup)
