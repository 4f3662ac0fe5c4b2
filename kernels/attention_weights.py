"""Attention weights with a softcap and sinks in plain torch: what the attention operators' references share.

    s = softcap * tanh(scale * q k' / softcap),    p_j = exp(s_j) / (exp(sink) + sum_i exp(s_i))

A sink is a learned logit of each query head that takes part in the softmax and has no value, so that the weights of a
query add up to less than one. Sources: Gemma 2 (arXiv 2408.00118, section 2) for the softcap, gpt-oss (OpenAI, 2025;
after StreamingLLM, arXiv 2309.17453) for the sinks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_COMMON_VARIANTS = (("/softcap", 256), ("/sinks", 64))  # head sizes of Gemma 2 and gpt-oss


class AttentionForm(NamedTuple):
    """How a layer makes weights of dot products; the keywords of the attention operators."""

    scale: float
    """Factor of the dot products."""
    window: int | None = None
    """A query sees keys at most `window - 1` positions back; None is unlimited."""
    softcap: float | None = None
    """Bound of the scores (Gemma 2); None is unbounded."""
    sinks: Tensor | None = None
    """[Hq], a learned logit of each head that joins the softmax (gpt-oss)."""


def checked_sinks(q: Tensor, num_heads: int, softcap: float | None, sinks: Tensor | None) -> Tensor | None:
    """The sinks in float32 (float64 for a float64 q) on the device of q, differentiably.

    Raises:
        ValueError: softcap is not above 0, or sinks are not one floating-point number for each of the query heads.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if sinks is None:
        return None
    if sinks.shape != (num_heads,) or not sinks.is_floating_point():
        raise ValueError(f"sinks must be floats [{num_heads}], one a query head; got {sinks.dtype} {list(sinks.shape)}")
    return sinks.to(q.device, torch.promote_types(q.dtype, torch.float32))


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(scores / softcap); the scores themselves where softcap is None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of the last axis of masked scores [..., K]; sinks [..., 1] broadcasts to them and is summed with them."""
    if sinks is None:
        return scores.softmax(-1)
    with_sink = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), -1)
    return with_sink.softmax(-1)[..., :-1]


def with_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add sinks to the result of attention without them.

    Args:
        out: [..., D], the weighted sum of values.
        lse: [...], the logarithm of the sum of exp(score).
        sinks: broadcasts to lse.

    Returns:
        The result and the logarithm with the sinks in the sum. The usual backward from these two gives the gradients of
        q, k and v; that of a sink is `- sum(exp(sink - lse) * rowsum(dout * out))` over its queries.
    """
    total = torch.logaddexp(lse, sinks)
    return out * (lse - total).exp()[..., None], total


def sink_gradient(delta_ht: Tensor, lse_ht: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks [H] from delta = rowsum(dout * out) and lse, which includes them, both [H, T]."""
    return -((sinks[:, None] - lse_ht).exp() * delta_ht).sum(1)


def is_rare(variant: str, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether few models need this variant ("", "/softcap", "/sinks" or both) of a Triton kernel (`AotKernel.rare`)."""
    return bool(variant) and (dtype != torch.bfloat16 or (variant, head_dim) not in _COMMON_VARIANTS)
