"""What happens to one row of logits: its log-prob and its gradient. Target and logsumexp read the same values.

Legend: n rows, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels import native as native_kernels


def logp(logits_nv: Tensor, target_n: Tensor, *, native: bool) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and the row's logsumexp, both [N], from float32 or float64 logits.

    The logsumexp is at least the row's maximum, so no log-prob is above 0.
    """
    return (native_kernels.row_logp if _fits(logits_nv, native) else torch_logp)(logits_nv, target_n)


def dlogits_(
    logits_nv: Tensor, target_n: Tensor, lse_n: Tensor, logit_scale: float, softcap: float | None, *, native: bool
) -> Tensor:
    """d logp / d (h W' + b), in place of the logits: (onehot - softmax), through softcap and scale."""
    kernel = native_kernels.row_dlogits_ if _fits(logits_nv, native) else torch_dlogits_
    return kernel(logits_nv, target_n, lse_n, logit_scale, softcap)


def _fits(logits_nv: Tensor, native: bool) -> bool:
    """The native kernels are float32; float64 is for checks, and torch's."""
    return native and logits_nv.dtype == torch.float32 and logits_nv.is_contiguous()


def torch_logp(logits_nv: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
    """`logp` by torch's own operators."""
    lse_n = torch.logsumexp(logits_nv, dim=-1)
    return logits_nv.gather(1, target_n[:, None]).squeeze(1) - lse_n, lse_n


def torch_dlogits_(
    logits_nv: Tensor, target_n: Tensor, lse_n: Tensor, logit_scale: float, softcap: float | None
) -> Tensor:
    """`dlogits_` by torch's own operators."""
    factor_nv = None if softcap is None else 1 - (logits_nv / softcap).square()
    logits_nv.sub_(lse_n[:, None]).exp_().neg_()
    index_n = torch.arange(logits_nv.shape[0], device=logits_nv.device)
    logits_nv[index_n, target_n] += 1.0
    if factor_nv is not None:
        logits_nv *= factor_nv
    return logits_nv if logit_scale == 1.0 else logits_nv.mul_(logit_scale)


def sequence_sums(logp_n: Tensor, cu_rows: Tensor) -> Tensor:
    """Sums of consecutive runs of rows: [N] float, cu_rows [S + 1] int32 -> [S], dtype of logp_n.

    Summed in float64 and rounded once, so that a sequence's sum does not depend on what is batched with it.
    """
    lengths = cu_rows.diff().to(device=logp_n.device, dtype=torch.int64)
    return torch.segment_reduce(logp_n.double(), "sum", lengths=lengths, unsafe=True).to(logp_n.dtype)
