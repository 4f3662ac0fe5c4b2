"""Log-probs and perplexities of given answers; the prompt is computed once for all of its candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from macpo.engine.attention import attention_hook
from macpo.engine.model import PolicyModule
from macpo.engine.pack import PrefixGroup, pack


@dataclass(frozen=True, slots=True)
class ResponseScore:
    """How likely one response is under a policy; natural logarithm."""

    token_logps: list[float]
    """log p of each response token given what precedes it."""
    sum_logp: float
    """Their sum: the sequence's log-prob, as DPO uses it."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_logps)

    @property
    def perplexity(self) -> float:
        """exp of the mean token NLL; infinite where that overflows."""
        mean_nll = -self.sum_logp / self.num_tokens
        return math.exp(mean_nll) if mean_nll < 700.0 else math.inf


@torch.no_grad()
def score(
    model: PolicyModule | PreTrainedModel | PeftModel,
    groups: Sequence[PrefixGroup] | Sequence[tuple[list[int], list[list[int]]]],
    *,
    max_tokens: int = 16384,
) -> list[list[ResponseScore]]:
    """Score every response of every group.

    Args:
        model: the policy; the same numerics path as training, so step 0 of DPO gives ln 2.
        groups: `PrefixGroup`s, or (prompt ids, [response ids, ...]).
        max_tokens: token budget of one packed forward.

    Returns:
        By group, by response. A score depends on `max_tokens` and the other groups only in its last bits.

    Raises:
        DataError: an empty prompt or response, or one longer than the model's positions.
    """
    policy = model if isinstance(model, PolicyModule) else PolicyModule(model)
    plain = [
        group if isinstance(group, PrefixGroup) else PrefixGroup(list(group[0]), [list(r) for r in group[1]])
        for group in groups
    ]
    scores: list[list[ResponseScore]] = [[] for _ in plain]
    with attention_hook(policy.base):
        for batch in pack(plain, max_tokens=max_tokens):
            logps = policy.token_logps(batch).tolist()
            bounds = iter(batch.cu_rows.tolist())
            start = next(bounds)
            for index in batch.groups:
                for _ in plain[index].responses:
                    end = next(bounds)
                    part = logps[start:end]
                    scores[index].append(ResponseScore(part, math.fsum(part)))
                    start = end
    return scores
