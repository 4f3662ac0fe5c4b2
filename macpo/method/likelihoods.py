"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from macpo.engine.config import (
    ComputeSettings,
)
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import ResponseScore, score
from macpo.engine.training.reference import shared_sums


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely an answer is under a policy: summed log-prob (nats) over its tokens."""

    sum_logp: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean token NLL of the answer, EOS included where it has one."""
        return math.exp(min(-self.sum_logp / self.num_tokens, 700.0))


def likelihoods(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[Likelihood]]:
    """Score every response of every group; all ranks get all results. Raises Stopped after `should_stop`."""
    scores = _scored(policy, groups, compute, world, should_stop, lambda g: [(r.sum_logp, r.num_tokens) for r in g])
    return [[Likelihood(sum_logp, num_tokens) for sum_logp, num_tokens in group] for group in scores]


def shared_parts(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """`objectives.shared_sums` of every response of every group: [R, 2] float64; all ranks get all results."""
    scores = _scored(policy, groups, compute, world, should_stop, lambda g: shared_sums([r.token_logps for r in g]))
    return torch.tensor([part for group in scores for part in group], dtype=torch.float64).reshape(-1, 2)


def _scored(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None,
    kept: Callable[[list[ResponseScore]], Any],
) -> list[Any]:
    """What is kept of each group's scores, the groups dealt out to the ranks; all ranks get all results."""
    mine = score(policy, groups, max_tokens=compute.score_tokens, world=world, should_stop=should_stop)
    found = world.gather([kept(scores) if scores else None for scores in mine])
    return [next(part for part in parts if part is not None) for parts in zip(*found, strict=True)]
