"""How likely responses are under a policy; a stage's ranks share the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.progress import counted
from macpo.method.policies import OpenPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from macpo.engine.models.policy import PolicyModule
    from macpo.engine.scoring import ResponseScore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a response is under a policy: its summed log-prob (nats) over its tokens."""

    sum_logp: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean token NLL of the response, EOS included where it has one."""
        return math.exp(min(-self.sum_logp / self.num_tokens, 700.0))


def likelihoods(policy: OpenPolicy, groups: Sequence[PrefixGroup]) -> list[list[Likelihood]]:
    """Score every response of every group; all ranks get all results. Raises Stopped where a stop is asked for."""
    scores = _scored(policy, policy.load(), groups, lambda g: [(r.sum_logp, r.num_tokens) for r in g])
    return [[Likelihood(sum_logp, num_tokens) for sum_logp, num_tokens in group] for group in scores]


def shared_parts(policy: OpenPolicy, module: PolicyModule, groups: Sequence[PrefixGroup]) -> Tensor:
    """`shared_sums` of every response of every group under `module`: [R, 2] float64; all ranks get all results."""
    import torch

    from macpo.engine.training.reference import shared_sums

    scores = _scored(policy, module, groups, lambda g: shared_sums([r.token_logps for r in g]))
    return torch.tensor([part for group in scores for part in group], dtype=torch.float64).reshape(-1, 2)


def _scored(
    policy: OpenPolicy,
    module: PolicyModule,
    groups: Sequence[PrefixGroup],
    kept: Callable[[list[ResponseScore]], list[T]],
) -> list[list[T]]:
    """What is kept of each group's scores. Each rank scores some of the groups; all ranks get all results."""
    from macpo.engine.scoring import score

    ctx, max_tokens = policy.ctx, policy.compute.score_tokens
    with counted(ctx.name if ctx.world.is_main else False, len(groups), unit="prompts scored") as count:

        def of_all(done: int = 0, tokens: int = 0) -> None:  # every rank scores about as many
            count(done * ctx.world.size, tokens * ctx.world.size)

        mine = score(
            module, groups, max_tokens=max_tokens, world=ctx.world, should_stop=ctx.stop_requested, count=of_all
        )
    found = ctx.world.gather([kept(scores) if scores else None for scores in mine])
    return [next(part for part in parts if part is not None) for parts in zip(*found, strict=True)]
