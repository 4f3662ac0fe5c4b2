"""An objective and the load-balancing loss of a mixture of experts, see `engine/models/router.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.router import Router, balance, router_logits, router_of
from macpo.engine.models.support import ROUTER_OFF
from macpo.engine.training.objectives import Objective
from macpo.kernels.transfer import together


@dataclass(frozen=True, eq=False)
class _Balanced(Objective):
    inner: Objective
    router: Router
    groups: Sequence[PrefixGroup]

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.inner.metrics, "router_loss")

    @property
    def fingerprint(self) -> str:
        return json.dumps([self.inner.fingerprint, "balanced", *astuple(self.router)])

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        self.inner.check(groups)

    def size(self, group: PrefixGroup) -> int:
        return self.inner.size(group)

    def begin(self, progress: float) -> None:
        self.inner.begin(progress)

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        with router_logits(policy.base) as found:
            loss, sums = self.inner(policy, batch, total)
        (logits,) = found
        members = [self.groups[index] for index in batch.groups]
        lengths = torch.tensor(batch.segments.cu_groups).diff()
        group_of = torch.arange(len(members)).repeat_interleave(lengths)
        weights = torch.tensor([float(self.size(group)) for group in members])
        group_of, sizes = together([group_of, weights], loss.device)
        part = (balance(logits, group_of, len(members), self.router) * sizes).sum()
        return loss + self.router.coefficient / total * part, torch.cat((sums, part.detach()[None]))


def balanced(objective: Objective, policy: PolicyModule, groups: Sequence[PrefixGroup]) -> Objective:
    """The objective, with `router_loss` times its coefficient added where the model's configuration asks for it.

    A step's `router_loss` is the mean over its groups, weighted as the objective weights them: alike for preference
    pairs, by response tokens for SFT.

    Raises:
        ConfigError: the layers are split by tensor parallelism, or the model's loss is not known.
    """
    router = router_of(policy.base)
    if router is None:
        return objective
    if policy.data is not None:
        raise ConfigError("the load-balancing loss has not been tested with compute.parallel.tensor", ROUTER_OFF)
    return _Balanced(objective, router, groups)
