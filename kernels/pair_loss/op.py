"""pair_loss: DPO-family losses straight from hidden states and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.linear_logp.op import LoraLike, check_head, choose, shard_head
from macpo.kernels.linear_logp.shard import VocabShard
from macpo.kernels.pair_loss import library
from macpo.kernels.pair_loss import shard as sharded
from macpo.kernels.pair_loss.losses import LossSettings, check_loss
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
    gamma: float | None = None,
    ld_alpha: float | None = None,
    sft_weight: float | None = None,
    num_pairs: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoraLike | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    route: str | None = None,
    shard: VocabShard | None = None,
) -> PairLoss:
    """Contrastive loss of B pairs; differentiable in hidden, weight, bias and the LoRA's factors.

    Gradients of the inputs that take some are formed in the forward (`chunked.py` counts the GEMMs); the backward
    multiplies them by the upstream gradient. Once differentiable.

    Args:
        hidden: [N, H] float: hidden states that predict response tokens, of sequences c0, r0, c1, r1, ...
        weight: [V, H], dtype of hidden.
        target: [N] int64: the token that each row predicts.
        cu_rows: [2B + 1] int32 on the CPU: where each sequence's rows begin, from 0 to N; none is empty.
        ref_logps: [2B] float32: summed log-probs of the same sequences under the reference policy, best from
            the same operator (`sequence_sums`, with the same ld_alpha); None is reference-free (a uniform reference:
            the log-ratio is the log-prob).
        loss: "sigmoid" (DPO), "sigmoid_norm" (length-normalised DPO), "ipo", "hinge", "robust", "simpo" or "orpo";
            formulas and sources in `losses.py`.
        beta: strength of the pull towards the reference; for IPO its tau, for ORPO its lambda.
        label_smoothing: assumed share of swapped pairs, for "sigmoid" (then cDPO) and "robust".
        gamma: target margin of "simpo", which needs it.
        ld_alpha: weight of the tokens beyond the shorter response's length (LD-DPO), for losses of summed log-ratios:
            "sigmoid", "robust" and "hinge".
        sft_weight: adds this times the NLL of the chosen response (token mean per pair, then mean over pairs);
            default 0, for "orpo" 1.
        num_pairs: pairs of the global batch, by which sums are divided; default B.
        bias, logit_scale, softcap, lora, chunk_rows, backend, route, shard: as in `linear_logp`.

    Returns:
        PairLoss; only its `loss` carries gradient.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together, a setting that the loss does not take.
        BackendError: the forced backend is not there.
        RuntimeError: a backward with create_graph=True.
    """
    check_head(hidden, weight, target, bias, logit_scale, softcap, lora, shard)
    if sft_weight is None:
        sft_weight = 1.0 if loss == "orpo" else 0.0
    settings = LossSettings(loss, beta, label_smoothing, gamma, ld_alpha, sft_weight)
    check_loss(settings, ref_logps is not None)
    if cu_rows.device.type != "cpu" or cu_rows.dtype != torch.int32 or cu_rows.dim() != 1:
        raise ValueError(f"cu_rows must be int32 [2B + 1] on the CPU, got {cu_rows.dtype} on {cu_rows.device}")
    if cu_rows.shape[0] < 3 or cu_rows.shape[0] % 2 == 0:
        raise ValueError(f"cu_rows must have 2B + 1 entries with B >= 1, got {cu_rows.shape[0]}")
    batch = cu_rows.shape[0] // 2
    if ref_logps is not None and (ref_logps.shape != (2 * batch,) or not ref_logps.is_floating_point()):
        raise ValueError(f"ref_logps must be float [{2 * batch}], got {ref_logps.dtype} {list(ref_logps.shape)}")
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    a, b, scaling = (None, None, 1.0) if lora is None else lora
    chosen_backend, needs, chosen_route, chunk_rows = choose(
        "pair_loss", hidden, weight, bias, softcap, lora, chunk_rows, backend, route, shard
    )
    ref_logps = None if ref_logps is None else ref_logps.detach()
    if shard is not None:
        head_of = shard_head(scaling, logit_scale, softcap, chosen_backend, shard)
        inputs = hidden, weight, bias, a, b
        shard_outputs = sharded.pair_loss(
            head_of, *inputs, target, cu_rows, ref_logps, settings, num_pairs or batch, shard, chunk_rows, needs
        )
        return _result(*shard_outputs[:4])
    outputs = library.pair_loss(
        hidden, weight, bias, a, b, target, cu_rows, ref_logps, loss, float(beta), float(label_smoothing),
        None if gamma is None else float(gamma), None if ld_alpha is None else float(ld_alpha), float(sft_weight),
        num_pairs or batch, float(scaling), float(logit_scale), None if softcap is None else float(softcap), chunk_rows,
        chosen_backend, needs, chosen_route,
    )  # fmt: skip
    return _result(*outputs[:4])


def _result(total: Tensor, sft_loss: Tensor, logps: Tensor, rewards: Tensor) -> PairLoss:
    margin = rewards[0::2] - rewards[1::2]
    return PairLoss(
        loss=total,
        chosen_logps=logps[0::2],
        rejected_logps=logps[1::2],
        chosen_rewards=rewards[0::2],
        rejected_rewards=rewards[1::2],
        accuracy=(margin > 0).to(torch.float32).mean(),
        margin=margin.mean(),
        sft_loss=sft_loss,
    )
