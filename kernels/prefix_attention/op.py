"""prefix_attention: attention in which n responses share one prompt, packed without padding."""

from __future__ import annotations

from torch import Tensor

from macpo.kernels.backend import explain
from macpo.kernels.prefix_attention import torch_impl
from macpo.kernels.prefix_attention.segments import Segments


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention under the shared-prefix rule; differentiable in q, k and v.

    Query token i sees the keys `[prefix_start, min(prefix_end, i + 1))` and `[segment_start, i]`.
    Query heads are grouped over the key/value heads in order (grouped-query attention).

    Args:
        q: [T, Hq, D] float.
        k, v: [T, Hkv, D], dtype of q; Hq is a multiple of Hkv.
        segments: what each of the T tokens may see.
        scale: factor on the scores; default D ** -0.5.
        window: a token sees at most the last `window` positions of its own sequence, itself included
            (Hugging Face's `sliding_window`); None for all.
        backend: force one; default by device (`macpo.kernels.backend`).

    Returns:
        [T, Hq, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        BackendError: the forced backend is not there.

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
    explain("prefix_attention", q.device, backend)
    return torch_impl.prefix_attention(q, k, v, segments, scale=scale, window=window)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
