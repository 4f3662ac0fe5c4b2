"""The head under tensor parallelism: every rank keeps its rows and computes the logits of its part of the vocabulary.

Ranks exchange a few numbers per response token and the gradient of the hidden states (`kernels/linear_logp/shard.py`).
A head that is not split by vocabulary, or that leaves a rank without any row, is gathered, and every rank computes all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from macpo.kernels import VocabShard


def vocab_shard(weight: Tensor) -> VocabShard | None:
    """How tensor parallelism splits a head's weight [V, H] over the ranks; None if it must be read whole.

    It must if it is not split by rows, or if a rank would have no row: V rows come in parts of ceil(V / ranks).
    """
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        return None
    vocab, ranks = weight.shape[0], weight.device_mesh.size()
    if vocab <= (ranks - 1) * -(-vocab // ranks):
        return None
    group = weight.device_mesh.get_group()

    def maximum(x: Tensor) -> Tensor:
        return _reduced(x.clone(), dist.ReduceOp.MAX, group)

    def total(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # 16-bit sums would be rounded once per rank
        return _reduced(x.to(wide, copy=True), dist.ReduceOp.SUM, group).to(x.dtype)

    return VocabShard(vocab, weight.device_mesh.get_local_rank(), ranks, maximum, total)


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, op=op, group=group)
    return x


def own_rows(weight: Tensor) -> Tensor:
    """This rank's rows of a weight that is split by rows; their gradient is the shard's."""
    if not isinstance(weight, DTensor):
        raise TypeError("a weight that tensor parallelism has not cut has no rows of this rank alone")
    return weight.to_local(grad_placements=[Shard(0)])
