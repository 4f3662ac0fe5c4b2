"""Log-prob, logsumexp and gradient of a row of a head's product, all from the same float32 values.

z is the raw product h W' (plus the LoRA's) in float32, float64 for checks; the logits are
y = softcap * tanh(scale * (z + bias) / softcap), without softcap scale * (z + bias), and

    d = d logp / d z = (onehot - softmax(y)) * (1 - (y / softcap) ** 2) * scale.

`z` may be row-major or the transposed view of a [V, N] buffer; d has z's layout. The functions of each backend:
- row_logp: log-prob of each target, never above 0, and the row's logsumexp, both [N] of z's dtype; z is unchanged.
- row_partials: partial sums of a softmax over more tokens than z holds, each [N] of z's dtype; z is unchanged:
  (largest logit m, sum of exp(y - m) over all tokens but the target, the target's logit).
- row_logp_dlogits_: `row_logp` and d [N, V] in `dtype`; z's storage is consumed, and d lies in `out` if given, else
  perhaps in z's.
- row_dlogits_: that d from the logsumexps.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.linear_logp import rows_torch


def kernels(z_nv: Tensor, backend: str) -> ModuleType:
    """The module with the four; float64 (for checks) always takes torch's."""
    if backend == "torch" or z_nv.dtype == torch.float64:
        return rows_torch
    if backend == "native":
        return native
    from macpo.kernels.linear_logp import triton_impl

    return triton_impl
