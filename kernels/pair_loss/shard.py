"""pair_loss over a head whose vocabulary is cut between processes, as in `linear_logp/shard.py`. Eager only.

Sums, losses and slopes are computed by every process from the same joined log-probs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from macpo.kernels.linear_logp.head import Needs
from macpo.kernels.linear_logp.library import check_target
from macpo.kernels.linear_logp.shard import HeadOf, VocabShard
from macpo.kernels.pair_loss import chunked, library
from macpo.kernels.pair_loss.losses import LossSettings


@torch.compiler.disable
def pair_loss(
    head_of: HeadOf, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    target: Tensor, cu_rows: Tensor, ref_logps: Tensor | None, settings: LossSettings, num_pairs: int,
    shard: VocabShard, chunk_rows: int, needs: list[bool],
) -> library.Outputs:  # fmt: skip
    """See `library.Outputs`; `op.pair_loss` has checked everything but targets and bounds."""
    bounds = chunked.check_bounds(cu_rows, hidden.shape[0])
    check_target(target, shard.vocab)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    pairs = chunked.Pairs(bounds, ref_logps, settings, num_pairs, hidden.new_empty(0, dtype=dtype))
    hidden, lora_a = shard.replicated(hidden), None if lora_a is None else shard.replicated(lora_a)
    outputs: library.Outputs = _PairLoss.apply(
        head_of, target, pairs, chunk_rows, needs, hidden, weight, bias, lora_a, lora_b
    )
    return outputs


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head_of: HeadOf, target: Tensor, pairs: chunked.Pairs, chunk_rows: int, needs: list[bool],
        hidden: Tensor, *weights: Any,
    ) -> library.Outputs:  # fmt: skip
        out = chunked.pair_loss(head_of(*weights), hidden, target, pairs, Needs(*needs), chunk_rows)
        outputs = library.outputs_of(out, hidden)
        library.keep(ctx, needs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *[None] * 5, *library.input_gradients(ctx, grad)
