"""Exact preference-training operators; they need torch and nothing else.

Each operator is a folder: `reference.py` the definition, `op.py` the contract and the choice of a backend,
`library.py` the custom operator for torch.compile, `triton_*.py` the GPU kernels; C++ for the CPU is in `csrc/`.
"""

from macpo.kernels.attention_weights import AttentionForm
from macpo.kernels.backend import BackendError, Choice, explain, use_backend
from macpo.kernels.linear_logp.op import linear_logp
from macpo.kernels.linear_logp.shard import VocabShard
from macpo.kernels.paged_attention.op import paged_attention, write_kv
from macpo.kernels.paged_attention.slots import slot_attention
from macpo.kernels.pair_loss.op import pair_loss
from macpo.kernels.pair_loss.result import PairLoss
from macpo.kernels.pair_loss.sequences import sequence_sums
from macpo.kernels.prefix_attention.op import plan_attention, prefix_attention
from macpo.kernels.prefix_attention.segments import Segments
from macpo.kernels.sampling.op import sample
from macpo.kernels.sampling.params import SampleParams

__all__ = [
    "AttentionForm",
    "BackendError",
    "Choice",
    "PairLoss",
    "SampleParams",
    "Segments",
    "VocabShard",
    "explain",
    "linear_logp",
    "paged_attention",
    "pair_loss",
    "plan_attention",
    "prefix_attention",
    "sample",
    "sequence_sums",
    "slot_attention",
    "use_backend",
    "write_kv",
]
