"""prefix_attention as torch custom operators, opaque to torch.compile and CUDA-graph capture.

The Triton kernels always run through them. The torch implementation does so only inside torch.compile: in eager mode
it keeps its masks on the Segments object, which a compiled graph cannot.

Legend: t tokens, h heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from macpo.kernels.prefix_attention import plan, torch_impl
from macpo.kernels.prefix_attention.segments import Segments


@torch.library.custom_op("macpo::prefix_attention_plan", mutates_args=())
def make_plan(
    prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor, window: int | None, head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """visible_3t, key_lists, query_lists, int32 (see `plan`): the segments as the kernels for these q, k, v want them.

    It does not take q itself, so that torch.compile merges the calls inside one graph into one (where it also
    differentiates). Layers that are compiled one by one get a plan that was made before (`op.plan_attention`).
    """
    from macpo.kernels.prefix_attention import triton_plan
    from macpo.kernels.prefix_attention.triton_impl import tiles_of

    start, end, own = (x.contiguous() for x in (prefix_start, prefix_end, segment_start))
    tiles = tiles_of(head_dim, dtype, prefix_start.device)
    forward, dkv = ((tile.block_q, tile.block_k) for tile in (tiles.forward, tiles.dkv))
    return triton_plan.make(start, end, own, window, forward, dkv)


@make_plan.register_fake
def _(prefix_start: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from macpo.kernels.prefix_attention.triton_impl import tiles_of

    *_, head_dim, dtype = args
    tiles = tiles_of(head_dim, dtype, prefix_start.device)
    num_tokens = prefix_start.shape[0]

    def blocks(size: int) -> int:
        return (num_tokens + size - 1) // size

    return (
        prefix_start.new_empty((3, num_tokens)),
        prefix_start.new_empty((blocks(tiles.forward.block_q), plan.FIRST + blocks(tiles.forward.block_k))),
        prefix_start.new_empty((blocks(tiles.dkv.block_k), plan.FIRST + blocks(tiles.dkv.block_q))),
    )


@torch.library.custom_op("macpo::prefix_attention_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, visible_3t: Tensor, key_lists: Tensor, query_lists: Tensor, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, Hq, D] and lse [Hq, T] by the Triton kernels; the lists are `make_plan`'s for their block sizes.

    Differentiable in q, k, v and sinks through o. `query_lists` is used by the backward.
    """
    from macpo.kernels.prefix_attention import triton_impl

    tiles = triton_impl.tiles_of(q.shape[2], q.dtype, q.device)
    return triton_impl.forward(q, k, v, visible_3t, key_lists, scale, tiles, softcap, sinks)


@forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("macpo::prefix_attention_backward", mutates_args=())
def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, visible_3t: Tensor, key_lists: Tensor,
    query_lists: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv by the Triton kernels, and the gradient of the sinks, empty where there are none."""
    from macpo.kernels.prefix_attention import triton_impl

    tiles = triton_impl.tiles_of(q.shape[2], q.dtype, q.device)
    return triton_impl.backward(do, q, k, v, o, lse, visible_3t, key_lists, query_lists, scale, tiles, softcap, sinks)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap, sinks = inputs
    ctx.save_for_backward(*tensors, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 9
    q, k, v, visible_3t, key_lists, query_lists, sinks, o, lse = ctx.saved_tensors
    lists = (visible_3t, key_lists, query_lists)
    dq, dk, dv, dsinks = backward(do, q, k, v, o, lse, *lists, ctx.scale, ctx.softcap, sinks)
    return dq, dk, dv, None, None, None, None, None, None if sinks is None else dsinks


forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("macpo::prefix_attention_torch", mutates_args=())
def torch_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor,
    scale: float | None, window: int | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The torch implementation; differentiable in q, k, v and sinks. Groups' borders are found from the segments."""
    segments = _segments(prefix_start, prefix_end, segment_start)
    out = torch_impl.prefix_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks)
    return out.contiguous()


@torch_forward.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("macpo::prefix_attention_torch_backward", mutates_args=())
def torch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor,
    scale: float | None, window: int | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the torch implementation, as `torch_impl.gradients` gives them, probabilities recomputed."""
    segments = _segments(prefix_start, prefix_end, segment_start)
    return torch_impl.gradients(do, q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks)


@backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, visible_3t: Tensor, key_lists: Tensor,
    query_lists: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients_like(q, k, v, sinks)


@torch_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor,
    scale: float | None, window: int | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients_like(q, k, v, sinks)


def _gradients_like(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _torch_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window, ctx.softcap, sinks = inputs
    ctx.save_for_backward(*tensors, sinks)


def _torch_differentiate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = torch_backward(do, *tensors, ctx.scale, ctx.window, ctx.softcap, sinks)
    return dq, dk, dv, None, None, None, None, None, None, None if sinks is None else dsinks


torch_forward.register_autograd(_torch_differentiate, setup_context=_torch_save)


def _segments(prefix_start: Tensor, prefix_end: Tensor, segment_start: Tensor) -> Segments:
    bounds = plan.group_bounds(prefix_start, prefix_end, segment_start)
    return Segments(prefix_start, prefix_end, segment_start, tuple(bounds.tolist()))
