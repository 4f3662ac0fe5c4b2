"""Training objectives, one function each: a sum over groups divided by the size of the global batch.

Because the divisor is the global batch's, micro-batches, packing and ranks only split a sum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from macpo.engine.config import PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import DataError
from macpo.engine.models.head import Head, pair_loss
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.reward.score_head import RewardModule
from macpo.kernels.pair_loss.losses import LossSettings
from macpo.kernels.transfer import to_device


class Objective(Protocol):
    """A loss that the trainer can split into micro-batches."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the sums that `__call__` returns; the trainer logs them divided by the step's total size."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that changes with the loss; a checkpoint with another one is not resumed."""
        ...

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        """Raise DataError if the groups do not fit the objective."""
        ...

    def size(self, group: PrefixGroup) -> int:
        """The group's contribution to the divisor of the step's loss."""
        ...

    def begin(self, progress: float) -> None:
        """Called before every step with the share of the training that is done, for a loss that changes on the way."""
        return None

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        """(scalar float32 share of the loss with gradient, detached float32 sums [len(metrics)])."""
        ...


class _Sft(Objective):
    metrics: tuple[str, ...] = ()
    fingerprint = "sft"

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        for index, group in enumerate(groups):
            group.check(f"group {index}")

    def size(self, group: PrefixGroup) -> int:
        return group.num_response_tokens

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        loss = -policy.token_logps(batch).sum() / total
        return loss, loss.new_zeros(0)


def sft() -> Objective:
    """Mean NLL of the response tokens of the global batch; with prompt = [BOS], plain language modelling."""
    return _Sft()


@dataclass(frozen=True, eq=False)
class _Preference(Objective):
    settings: PreferenceSettings
    ref_logps: Tensor | None  # [num_groups, 2] float32, on the CPU
    metrics: tuple[str, ...] = (
        "chosen_logps",
        "rejected_logps",
        "chosen_rewards",
        "rejected_rewards",
        "margin",
        "accuracy",
        "sft_loss",
    )

    @property
    def fingerprint(self) -> str:
        digest = None if self.ref_logps is None else hashlib.sha256(self.ref_logps.numpy().tobytes()).hexdigest()
        return json.dumps(["preference", *asdict(loss_settings(self.settings)).values(), digest])

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        if self.ref_logps is not None and len(groups) != self.ref_logps.shape[0]:
            fix = "score the same pairs"
            raise DataError(f"{len(groups)} pairs but reference log-probs for {self.ref_logps.shape[0]}", fix)
        for index, group in enumerate(groups):
            _check_pair(index, group)

    def size(self, group: PrefixGroup) -> int:
        return 1

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        options = asdict(loss_settings(self.settings))
        ref_logps = None if self.ref_logps is None else self.ref_logps[list(batch.groups)].flatten()

        def reduce(rows: Tensor, head: Head, batch: PackedBatch) -> tuple[Tensor, Tensor]:
            out = pair_loss(rows, head, batch, ref_logps, num_pairs=total, **options)
            pairs = len(batch.groups)
            per_pair = (out.chosen_logps, out.rejected_logps, out.chosen_rewards, out.rejected_rewards)
            sums = [*(x.sum() for x in per_pair), out.margin * pairs, out.accuracy * pairs, out.sft_loss * total]
            return out.loss, torch.stack(sums).detach().float()

        return policy(batch, reduce)


def _check_pair(index: int, group: PrefixGroup) -> None:
    group.check(f"pair {index}")
    if len(group.responses) != 2:
        raise DataError(f"pair {index} has {len(group.responses)} responses", "give chosen and rejected")


def loss_settings(settings: PreferenceSettings) -> LossSettings:
    """The settings of the loss operator."""
    return LossSettings(**{field.name: getattr(settings, field.name) for field in fields(LossSettings)})


def preference(settings: PreferenceSettings, ref_logps: Tensor | None) -> Objective:
    """A contrastive loss of `kernels/pair_loss` plus `sft_weight` times the chosen response's mean token NLL.

    Args:
        settings: the loss and its options.
        ref_logps: [num_groups, 2] float32, summed log-probs of (chosen, rejected) under the reference policy, with the
            settings' ld_alpha (see `reference_logps`); None for a loss without a reference. Groups are
            prompt + [chosen, rejected].

    Raises:
        DataError: `ref_logps` has another shape, is missing, or is given for a loss without a reference.
    """
    if (ref_logps is not None) != settings.has_reference:
        needs = "needs" if settings.has_reference else "takes no"
        fix = "score the pairs with the reference policy for the losses that have one"
        raise DataError(f"the loss {settings.loss!r} {needs} reference log-probs", fix)
    if ref_logps is None:
        return _Preference(settings, None)
    if ref_logps.dim() != 2 or ref_logps.shape[1] != 2:
        fix = "give one (chosen, rejected) row a pair"
        raise DataError(f"reference log-probs of shape {list(ref_logps.shape)}", fix)
    return _Preference(settings, ref_logps.detach().to("cpu", torch.float32).contiguous())


@dataclass(frozen=True, eq=False)
class _BradleyTerry(Objective):
    centring: float
    margins: Tensor | None  # [num_groups] float32, on the CPU
    metrics: tuple[str, ...] = ("chosen_rewards", "rejected_rewards", "margin", "accuracy")

    @property
    def fingerprint(self) -> str:
        digest = None if self.margins is None else hashlib.sha256(self.margins.numpy().tobytes()).hexdigest()
        return json.dumps(["bradley-terry", self.centring, digest])

    def check(self, groups: Sequence[PrefixGroup]) -> None:
        if self.margins is not None and len(groups) != len(self.margins):
            raise DataError(f"{len(groups)} pairs but {len(self.margins)} margins", "give one margin a pair")
        for index, group in enumerate(groups):
            _check_pair(index, group)

    def size(self, group: PrefixGroup) -> int:
        return 1

    def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
        assert isinstance(policy, RewardModule)
        chosen_b, rejected_b = policy(batch).view(-1, 2).unbind(1)
        margins = None if self.margins is None else to_device(self.margins[list(batch.groups)], chosen_b.device)
        loss = bradley_terry_loss(chosen_b, rejected_b, margins, self.centring).sum() / total
        won = (chosen_b > rejected_b).float()
        sums = [x.sum() for x in (chosen_b, rejected_b, chosen_b - rejected_b, won)]
        return loss, torch.stack(sums).detach()


def bradley_terry_loss(chosen_b: Tensor, rejected_b: Tensor, margins_b: Tensor | None, centring: float) -> Tensor:
    """The loss of each pair, -log sigmoid(r+ - r- - m) + c (r+ + r-)^2: [B] float32, from rewards [B] float32.

    Bradley-Terry with a margin m: Touvron et al., arXiv 2307.09288, equation 2; without one, Ouyang et al., arXiv
    2203.02155, equation 1. The second term, which keeps rewards around zero, is Eisenstein et al., arXiv 2312.09244,
    equation 2. TRL's RewardTrainer (1.16) takes the mean of both terms over the pairs of a batch.
    """
    difference_b = chosen_b - rejected_b
    if margins_b is not None:
        difference_b = difference_b - margins_b
    return functional.softplus(-difference_b) + centring * (chosen_b + rejected_b).square()


def bradley_terry(centring: float = 0.01, margins: Tensor | None = None) -> Objective:
    """The mean of `bradley_terry_loss` over the pairs of the global batch, for a `RewardModule`.

    Args:
        centring: weight c of the term that keeps rewards around zero; 0 leaves it out.
        margins: [num_groups] target difference m of each pair's rewards; None is 0. Groups are
            prompt + [chosen, rejected].
    """
    return _BradleyTerry(centring, None if margins is None else margins.detach().to("cpu", torch.float32).contiguous())
