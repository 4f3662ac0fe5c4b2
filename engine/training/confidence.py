"""SFT on weak labels that lets the student disagree where it is sure of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError
from macpo.engine.models.head import Head
from macpo.engine.models.policy import PolicyModule
from macpo.engine.training.objectives import Objective
from macpo.kernels import linear_logp
from macpo.kernels.transfer import together

_CHUNK_ELEMENTS = 1 << 24
"""Logits that are held at once to look for the most likely token."""


@dataclass(eq=False)
class _Confident(Objective):
    weight: float
    warmup: float
    metrics: tuple[str, ...] = ("label_nll", "confident", "disagrees")
    progress: float = field(default=0.0, init=False)

    @property
    def fingerprint(self) -> str:
        return json.dumps(["confident", self.weight, self.warmup])

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        for index, group in enumerate(groups):
            group.check(f"group {index}")

    def size(self, group: PrefixGroup) -> int:
        return group.num_response_tokens

    def begin(self, progress: float) -> None:
        self.progress = progress

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        share = self.weight * (min(1.0, self.progress / self.warmup) if self.warmup > 0 else 1.0)

        def reduce(rows: Tensor, head: Head, batch: PackedBatch) -> tuple[Tensor, Tensor]:
            target = batch.target.to(rows.device)
            own = most_likely(rows.detach(), head)
            both = linear_logp(torch.cat((rows, rows)), head.weight, torch.cat((target, own)), **head.rest)
            label, best = both.chunk(2)
            sure = best.detach() >= medians(best.detach(), batch.cu_rows)
            loss = -((1 - share) * label.sum() + share * best[sure].sum()) / total
            sums = (-label.detach().sum(), sure.sum().float(), (sure & (own != target)).sum().float())
            return loss, torch.stack(sums)

        return policy(batch, reduce)


def confident_sft(weight: float = 0.5, warmup: float = 0.2) -> Objective:
    """Mean over response tokens of -(1 - c) log p(y_t) - c [max_v p(v) >= tau] log p(argmax_v p(v)).

    The auxiliary confidence loss of weak-to-strong generalisation (Burns et al., arXiv 2312.09390, section 4.3 and
    appendix A.4), which is for classes, carried over to text: a token is a class, and tau, the paper's adaptive
    threshold on a batch of predictions, is the median of max_v p(v) over a response's own tokens. So half of every
    response hardens what the student believes, whatever is packed beside it. argmax and tau carry no gradient.

    Args:
        weight: c, the paper's alpha_max, from 0 to 1.
        warmup: share of the training over which c grows linearly from 0.
    """
    return _Confident(weight, warmup)


@torch.no_grad()
def most_likely(rows: Tensor, head: Head) -> Tensor:
    """The most likely next token of each hidden state: [N, H] -> [N] int64.

    Raises:
        ConfigError: the vocabulary is split over ranks.
    """
    if head.shard is not None:
        fix = "leave out compute.parallel.tensor, or train with another method"
        raise ConfigError("the confidence loss needs the whole vocabulary on each rank", fix)
    # scale and softcap keep the order of logits, so the bias alone counts beside the product
    step = max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
    found = []
    for part in rows.split(step):
        logits = torch.nn.functional.linear(part.to(head.weight.dtype), head.weight, head.bias)
        found.append(logits.argmax(dim=-1))
    return torch.cat(found)


def medians(values: Tensor, cu_rows: Tensor) -> Tensor:
    """The lower median of each response's values, at each of its rows: [N] and offsets [R + 1] -> [N]."""
    lengths = cu_rows.diff()
    response = torch.arange(len(lengths)).repeat_interleave(lengths)
    middle = cu_rows[:-1] + (lengths - 1).clamp(min=0) // 2
    response, middle = together([response, middle.long()], values.device)
    by_value = values.argsort(stable=True)
    order = by_value[response[by_value].argsort(stable=True)]
    return values[order[middle]][response]
