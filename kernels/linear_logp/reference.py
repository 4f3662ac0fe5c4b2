"""linear_logp in plain torch: the definition that every backend is tested against.

Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_logits(
    hidden_nh: Tensor, weight_vh: Tensor, bias_v: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Logits [N, V] in float32 (float64 for float64 inputs): softcap * tanh(scale * (h W' + b) / softcap)."""
    dtype = torch.promote_types(hidden_nh.dtype, torch.float32)
    logits_nv = hidden_nh.to(dtype) @ weight_vh.to(dtype).T
    if bias_v is not None:
        logits_nv = logits_nv + bias_v.to(dtype)
    logits_nv = logits_nv * logit_scale
    return logits_nv if softcap is None else softcap * torch.tanh(logits_nv / softcap)


def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """hidden [N, H], weight [V, H], target [N] -> [N]; see `op.linear_logp`. Differentiable by autograd."""
    if lora is not None:
        a, b, scaling = lora
        weight = weight + scaling * (b @ a)
    logp_nv = head_logits(hidden, weight, bias, logit_scale, softcap).log_softmax(dim=-1)
    return logp_nv.gather(1, target[:, None]).squeeze(1)
