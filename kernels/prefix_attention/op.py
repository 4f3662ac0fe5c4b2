"""prefix_attention: attention in which n responses share one prompt, packed without padding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from macpo.kernels.attention_weights import checked_sinks
from macpo.kernels.backend import BackendError, explain
from macpo.kernels.prefix_attention import flash_impl, library, torch_impl
from macpo.kernels.prefix_attention.segments import Segments


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention under the shared-prefix rule; differentiable in q, k, v and sinks.

    Query token i sees the keys `[prefix_start, min(prefix_end, i + 1))` and `[segment_start, i]`.
    Query heads are grouped over the key/value heads in order (grouped-query attention).

    Args:
        q: [T, Hq, D] float.
        k, v: [T, Hkv, D], dtype of q; Hq is a multiple of Hkv.
        segments: what each of the T tokens may see.
        scale: factor on the scores; default D ** -0.5.
        window: a token sees at most the last `window` positions of its own sequence, itself included
            (Hugging Face's `sliding_window`); None for all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
        sinks: [Hq] float, a logit of each query head that joins the softmax and has no value (gpt-oss); None for none.
        backend: force one; see `choose`.

    Returns:
        [T, Hq, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a softcap that is not above 0.
        BackendError: the forced backend is not there, or has no sinks.

    Source: the sharing rule is that of prefix sharing for preference pairs (arXiv 2410.20305), for n responses.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"need q [T, Hq, D] and k, v [T, Hkv, D]; got {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q and k differ in T or D, or Hq is no multiple of Hkv: {_shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if segments.num_tokens != q.shape[0]:
        raise ValueError(f"segments describe {segments.num_tokens} tokens, q has {q.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    sinks = checked_sinks(q, q.shape[1], softcap, sinks)
    name, _ = choose(q, backend)
    if name == "triton":
        return _triton(q, k, v, segments, scale, window, softcap, sinks)
    if name == "flash":
        if torch.compiler.is_compiling():
            raise BackendError("backend 'flash' lists its sequences on the host, which a compiled graph cannot do")
        if sinks is not None:
            raise BackendError("backend 'flash' has no attention sinks; leave the choice of the backend to macpo")
        return flash_impl.prefix_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap)
    if torch.compiler.is_compiling():
        return library.torch_forward(q, k, v, *_integers(segments, q), scale, window, softcap, sinks)
    return torch_impl.prefix_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks)


def choose(q: Tensor, backend: str | None = None) -> tuple[str, str]:
    """The backend that runs for q [T, Hq, D], and why: "triton", "torch", or "flash" where that is asked for.

    The default follows `macpo.kernels.explain`, except that CUDA tensors which the Triton kernels do not take
    (float64, head sizes above 256) go to torch. flash-attn copies prompts and is used with `backend="flash"` only.

    Raises:
        BackendError: the forced backend is not there, or does not take such a q.
    """
    return _choose(q.device.type, q.dtype, q.shape[2], backend)


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, head_dim: int, backend: str | None) -> tuple[str, str]:
    """`choose`; a compiled graph keeps the choice of its compilation."""
    if backend == "flash":
        if why_not := flash_impl.why_not(device, dtype, head_dim):
            raise BackendError(f"prefix_attention: backend 'flash' cannot be used: {why_not}")
        return "flash", "backend='flash' was passed to prefix_attention"
    choice = explain("prefix_attention", device, backend)
    if choice.backend == "triton" and (why_not := _not_for_triton(dtype, head_dim)):
        if backend is not None:
            raise BackendError(f"prefix_attention: backend 'triton' cannot be used: {why_not}")
        return "torch", why_not
    return choice.backend, choice.why


def _triton(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    plan = segments.plans.get((window, q.shape[2], q.dtype))
    if plan is None or plan[0].device != q.device:
        plan = library.make_plan(*_integers(segments, q), window, q.shape[2], q.dtype)
        if _may_keep(q):
            segments.plans[window, q.shape[2], q.dtype] = plan
    return library.forward(q, k, v, *plan, q.shape[2] ** -0.5 if scale is None else scale, softcap, sinks)[0]


def _may_keep(q: Tensor) -> bool:
    """Whether a plan made now can serve later calls: a compiled graph keeps nothing, a captured one fills it later."""
    return not torch.compiler.is_compiling() and not (q.is_cuda and torch.cuda.is_current_stream_capturing())


def plan_attention(segments: Segments, kinds: Iterable[tuple[int | None, int]], dtype: torch.dtype) -> None:
    """Make what the kernels want to know of a row before its first layer, and keep it on `segments`.

    Layers that are compiled one by one take it from there; without it each would make it again. Does nothing where
    other kernels run.

    Args:
        segments: of the row, on the device of q.
        kinds: (window, head size D) of the layers.
        dtype: that of q, k and v.
    """
    device = segments.prefix_start.device
    for window, head_dim in kinds:
        missing = (window, head_dim, dtype) not in segments.plans
        if missing and _choose(device.type, dtype, head_dim, None)[0] == "triton":
            integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
            segments.plans[window, head_dim, dtype] = library.make_plan(*integers, window, head_dim, dtype)


def _not_for_triton(dtype: torch.dtype, head_dim: int) -> str:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels are for bf16, fp16 and fp32, not {dtype}"
    if head_dim > 256:
        return f"the Triton kernels hold head sizes up to 256, not {head_dim}"
    return ""


def _integers(segments: Segments, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device
    return segments.prefix_start.to(device), segments.prefix_end.to(device), segments.segment_start.to(device)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
