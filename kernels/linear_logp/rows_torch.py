"""The row kernels by torch's own operators; contract in `rows.py`.

Rows are handled in blocks, so that temporaries stay small beside the chunk that they belong to.
Legend: n rows, v vocabulary; z the raw product h W', y the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block's temporaries: 4 MiB of float32 on a CPU; larger on a device, where a launch has a price.
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS = 2**20, 2**24


def row_logp(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logp_n, lse_n = z_nv.new_empty(z_nv.shape[0]), z_nv.new_empty(z_nv.shape[0])
    for part in _blocks(z_nv):
        y_nv = _logits_(z_nv[part].clone(), bias_v, scale, softcap)
        logp_n[part], lse_n[part] = _logp_(y_nv, target_n[part])
    return logp_n, lse_n


def row_partials(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    top_n, rest_n, hit_n = (z_nv.new_empty(z_nv.shape[0]) for _ in range(3))
    for part in _blocks(z_nv):
        y_nv = z_nv[part].clone()
        top_n[part], rest_n[part], hit_n[part] = _partials_(_logits_(y_nv, bias_v, scale, softcap), target_n[part])
        del y_nv  # before the next block's is made
    return top_n, rest_n, hit_n


def row_logp_dlogits_(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logp_n, lse_n = z_nv.new_empty(z_nv.shape[0]), z_nv.new_empty(z_nv.shape[0])
    d_nv = _d_of(z_nv, dtype) if out is None else out
    for part in _blocks(z_nv):
        y_nv = _logits_(z_nv[part], bias_v, scale, softcap)
        logp_n[part], lse_n[part] = _logp_(y_nv.clone(), target_n[part])
        _dlogits_(y_nv, target_n[part], lse_n[part], scale, softcap)
        if d_nv is not z_nv:
            d_nv[part] = y_nv.to(dtype)  # by way of a temporary: source and result share memory
    return logp_n, lse_n, d_nv


def row_dlogits_(
    z_nv: Tensor, target_n: Tensor, lse_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None,
    dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Without `out`, float32 and float64 results overwrite z; 16-bit ones are written over the front of each row of
    z, or to a buffer of their own where z is the transposed view."""
    d_nv = _d_of(z_nv, dtype) if out is None else out
    for part in _blocks(z_nv):
        y_nv = _logits_(z_nv[part], bias_v, scale, softcap)
        _dlogits_(y_nv, target_n[part], lse_n[part], scale, softcap)
        if d_nv is not z_nv:
            d_nv[part] = y_nv.to(dtype)
    return d_nv


def _d_of(z_nv: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory for d: z itself, or a 16-bit dtype's [N, V] over the front half of every float32 row of z."""
    if dtype == z_nv.dtype:
        return z_nv
    if z_nv.stride(-1) != 1 or z_nv.dtype != torch.float32:
        return torch.empty_like(z_nv, dtype=dtype)
    return z_nv.view(dtype)[:, : z_nv.shape[1]]


def _logits_(z_nv: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(scale * (z + b) / softcap), in place."""
    if bias_v is not None:
        z_nv += bias_v
    if scale != 1.0:
        z_nv *= scale
    return z_nv if softcap is None else z_nv.div_(softcap).tanh_().mul_(softcap)


def _logp_(y_nv: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and the rows' logsumexp; y is consumed.

    The logsumexp is at least the row's maximum, so no log-prob is above 0.
    """
    hit_n = y_nv.gather(1, target_n[:, None]).squeeze(1).double()
    top_n = y_nv.amax(dim=-1)
    shift_n = top_n.masked_fill(top_n == float("-inf"), 0.0)  # a row of -inf alone: no inf - inf
    sums_n = y_nv.sub_(shift_n[:, None]).exp_().sum(dim=-1)
    lse_n = sums_n.double().log_().add_(shift_n)  # in float64, so that logp is rounded once, at its own size
    return (hit_n - lse_n).to(y_nv.dtype), lse_n.to(y_nv.dtype)


def _partials_(y_nv: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(y - maximum) without the target, and the target's logit; y is consumed."""
    hit_n, top_n = y_nv.gather(1, target_n[:, None]).squeeze(1), y_nv.amax(dim=-1)
    shift_n = top_n.masked_fill(top_n == float("-inf"), 0.0)
    rest_n = y_nv.sub_(shift_n[:, None]).exp_().scatter_(1, target_n[:, None], 0.0).sum(dim=-1)
    return top_n, rest_n, hit_n


def _dlogits_(y_nv: Tensor, target_n: Tensor, lse_n: Tensor, scale: float, softcap: float | None) -> None:
    """(onehot - softmax) through softcap and scale, in place of the logits."""
    factor_nv = None if softcap is None else 1 - (y_nv / softcap).square()
    y_nv.sub_(lse_n[:, None]).exp_().neg_()
    y_nv[torch.arange(y_nv.shape[0], device=y_nv.device), target_n] += 1.0
    if factor_nv is not None:
        y_nv *= factor_nv
    if scale != 1.0:
        y_nv *= scale


def _blocks(z_nv: Tensor) -> Iterator[slice]:
    elements = BLOCK_ELEMENTS_CPU if z_nv.device.type == "cpu" else BLOCK_ELEMENTS
    rows = max(1, elements // max(1, z_nv.shape[1]))
    return (slice(start, start + rows) for start in range(0, z_nv.shape[0], rows))
