"""Log-prob, logsumexp and gradient of a row of a head's product, all from the same float32 values.

z is the raw product h W' (plus the LoRA's) in float32, float64 for checks; the logits are
y = softcap * tanh(scale * (z + bias) / softcap), without softcap scale * (z + bias), and

    d = d logp / d z = (onehot - softmax(y)) * (1 - (y / softcap) ** 2) * scale.

`z` may be row-major or the transposed view of a [V, N] buffer; d has z's layout.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.linear_logp import rows_torch


def logp(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and the row's logsumexp, both [N] of z's dtype; z is unchanged.

    No log-prob is above 0.
    """
    kernels = _kernels(z_nv, backend)
    return cast(tuple[Tensor, Tensor], kernels.row_logp(z_nv, target_n, bias_v, scale, softcap))


def partials(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums of a softmax over more tokens than z holds, each [N] of z's dtype; z is unchanged.

    (largest logit m, sum of exp(y - m) over all tokens but the target, the target's logit).
    """
    kernels = _kernels(z_nv, backend)
    return cast(tuple[Tensor, Tensor, Tensor], kernels.row_partials(z_nv, target_n, bias_v, scale, softcap))


def logp_dlogits_(
    z_nv: Tensor,
    target_n: Tensor,
    bias_v: Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`logp` and d [N, V] in `dtype`; z's storage is consumed, and d lies in `out` if given, else perhaps in z's."""
    kernels = _kernels(z_nv, backend)
    results = kernels.row_logp_dlogits_(z_nv, target_n, bias_v, scale, softcap, dtype, out)
    return cast(tuple[Tensor, Tensor, Tensor], results)


def dlogits_(
    z_nv: Tensor,
    target_n: Tensor,
    lse_n: Tensor,
    bias_v: Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    grad_n: Tensor | None,
    out: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """d [N, V] in `dtype`, times grad_n[:, None] where given; z's storage is consumed, d lies as in `logp_dlogits_`."""
    kernels = _kernels(z_nv, backend)
    return cast(Tensor, kernels.row_dlogits_(z_nv, target_n, lse_n, bias_v, scale, softcap, dtype, grad_n, out))


def _kernels(z_nv: Tensor, backend: str) -> ModuleType:
    """The module with `row_logp`, `row_partials` and the two that give d; float64 (for checks) always takes torch's."""
    if backend == "torch" or z_nv.dtype == torch.float64:
        return rows_torch
    if backend == "native":
        return native
    from macpo.kernels.linear_logp import triton_impl

    return triton_impl
