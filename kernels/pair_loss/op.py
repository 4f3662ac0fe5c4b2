"""pair_loss: DPO-family losses straight from hidden states and the head."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from macpo.kernels.backend import explain
from macpo.kernels.linear_logp.op import check_head
from macpo.kernels.pair_loss import torch_impl
from macpo.kernels.pair_loss.losses import check_loss
from macpo.kernels.pair_loss.result import PairLoss


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_rows: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    num_pairs: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> PairLoss:
    """Contrastive loss of B pairs; differentiable in hidden, weight and bias.

    Args:
        hidden: [N, H] float: the rows that predict response tokens, of sequences c0, r0, c1, r1, ...
        weight: [V, H], dtype of hidden. For a LoRA on the head pass the adapted weight.
        target: [N] int64: the token that each row predicts.
        cu_rows: [2B + 1] int32 on the CPU: where each sequence's rows begin, from 0 to N; none is empty.
        ref_logps: [2B] float32: summed log-probs of the same sequences under the reference policy, best from
            the same operator; None is reference-free (a uniform reference: the log-ratio is the log-prob).
        loss: "sigmoid" (DPO), "ipo", "hinge" or "robust"; formulas and sources in `losses.py`.
        beta: strength of the pull towards the reference; for IPO its tau.
        label_smoothing: assumed share of swapped pairs, for "sigmoid" (then cDPO) and "robust".
        sft_weight: adds this times the NLL of the chosen response (token mean per pair, then mean over pairs).
        num_pairs: pairs of the global batch, by which sums are divided; default B.
        bias, logit_scale, softcap, chunk_rows, backend: as in `linear_logp`.

    Returns:
        PairLoss; only its `loss` carries gradient.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together.
        BackendError: the forced backend is not there.
    """
    check_head(hidden, weight, target, bias, logit_scale, softcap)
    check_loss(loss, beta, label_smoothing)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if cu_rows.device.type != "cpu" or cu_rows.dtype != torch.int32 or cu_rows.dim() != 1:
        raise ValueError(f"cu_rows must be int32 [2B + 1] on the CPU, got {cu_rows.dtype} on {cu_rows.device}")
    bounds = cu_rows.tolist()
    if len(bounds) < 3 or len(bounds) % 2 == 0:
        raise ValueError(f"cu_rows must have 2B + 1 entries with B >= 1, got {len(bounds)}")
    empty = any(a >= b for a, b in pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != hidden.shape[0] or empty:
        raise ValueError(f"cu_rows must grow strictly from 0 to N = {hidden.shape[0]}, got {bounds}")
    batch = len(bounds) // 2
    if ref_logps is not None and (ref_logps.shape != (2 * batch,) or not ref_logps.is_floating_point()):
        raise ValueError(f"ref_logps must be float [{2 * batch}], got {ref_logps.dtype} {list(ref_logps.shape)}")
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    if sft_weight < 0:
        raise ValueError(f"sft_weight must not be negative, got {sft_weight}")
    choice = explain("pair_loss", hidden.device, backend)
    return torch_impl.pair_loss(
        hidden,
        weight,
        target,
        cu_rows,
        None if ref_logps is None else ref_logps.detach(),
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        sft_weight=sft_weight,
        num_pairs=num_pairs or batch,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
        native=choice.backend == "native",
    )
