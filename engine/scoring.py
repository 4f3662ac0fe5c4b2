"""Log-probs and perplexities of given responses; a prompt is computed once for all its responses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from macpo.engine.data.batches import MicroBatch, microbatches
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, pack
from macpo.engine.distributed.failures import is_out_of_memory, make_room
from macpo.engine.distributed.world import World
from macpo.engine.errors import ResourceError, Stopped
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.parallelize import data_world
from macpo.engine.models.policy import PolicyModule
from macpo.engine.progress import Count, uncounted


@dataclass(frozen=True, slots=True)
class ResponseScore:
    """The log-probs (nats) of one response under a policy."""

    token_logps: list[float]
    """Log-prob of each response token given what precedes it."""
    sum_logp: float
    """Their sum: the sequence's log-prob, as DPO uses it."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_logps)

    @property
    def perplexity(self) -> float:
        """exp of the mean token NLL; infinite if that overflows."""
        mean_nll = -self.sum_logp / self.num_tokens
        return math.exp(mean_nll) if mean_nll < 700.0 else math.inf


@torch.no_grad()
def score(
    model: PolicyModule | PreTrainedModel | PeftModel,
    groups: Sequence[PrefixGroup] | Sequence[tuple[list[int], list[list[int]]]],
    *,
    max_tokens: int = 16384,
    world: World | None = None,
    should_stop: Callable[[], bool] | None = None,
    count: Count = uncounted,
) -> list[list[ResponseScore]]:
    """Score every response of every group.

    Args:
        model: the policy; it computes as in training, so step 0 of DPO gives ln 2.
        groups: `PrefixGroup`s, or (prompt ids, [response ids, ...]).
        max_tokens: token budget of one packed forward; a forward that does not fit in memory is split.
        world: the ranks that share the work; they all call this with the same groups. Default: this process alone, or
            all ranks if the policy is spread over them.
        should_stop: called before every forward.
        count: called after every forward of this rank, with its numbers of groups and tokens.

    Returns:
        Scores by group and response; an empty list for a group that another rank scores. A score depends on
        `max_tokens` and the other groups only in its last bits.

    Raises:
        DataError: an empty prompt or response, or one longer than the model's positions.
        ResourceError: one group does not fit in memory.
        Stopped: `should_stop` returned True on any rank; raised on all of them.
    """
    policy = model if isinstance(model, PolicyModule) else PolicyModule(model)
    plain = [
        group if isinstance(group, PrefixGroup) else PrefixGroup(list(group[0]), [list(r) for r in group[1]])
        for group in groups
    ]
    scores: list[list[ResponseScore]] = [[] for _ in plain]
    world = world or (World.current() if policy.collective else World())
    asked = should_stop or (lambda: False)
    together = policy.collective and world.size > 1  # then no rank may leave before the others
    data = data_world(policy, world) if world.size > 1 else world
    todo = deque(microbatches(plain, range(len(plain)), max_tokens, data, collective=together))
    stopped = False
    with attention_hook(policy.base):
        while todo and not stopped:
            stopped = any(world.gather(asked())) if together else asked()
            micro = todo.popleft()
            logps = None if stopped else _logps(policy, micro.batch)
            if logps is not None and not micro.filler:
                _hand_out(logps, micro.batch, plain, scores)
                count(len(micro.batch.groups), micro.batch.num_tokens)
            elif logps is None and not stopped:
                todo.extendleft(reversed(_halves(micro, plain, together)))
    policy.release()
    if any(world.gather(stopped)):
        raise Stopped("stopped while scoring", "run the same command again")
    return scores


def _logps(policy: PolicyModule, batch: PackedBatch) -> list[float] | None:
    """Log-probs [N], or None if memory ran out."""
    try:
        logps: list[float] = policy.token_logps(batch).tolist()
        return logps
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def _hand_out(
    logps: list[float], batch: PackedBatch, groups: Sequence[PrefixGroup], scores: list[list[ResponseScore]]
) -> None:
    start, *ends = batch.cu_rows.tolist()
    bounds = iter(ends)
    for index in batch.groups:
        for _ in groups[index].responses:
            end = next(bounds)
            part = logps[start:end]
            scores[index].append(ResponseScore(part, math.fsum(part)))
            start = end


def _halves(micro: MicroBatch, groups: Sequence[PrefixGroup], together: bool) -> list[MicroBatch]:
    """What is scored in place of a forward for which there was no memory."""
    if make_room() and not together:
        return [micro]
    tokens = micro.batch.num_tokens
    if together or len(micro.batch.groups) == 1:
        fix = "lower compute.score_tokens" if len(micro.batch.groups) > 1 else "lower context_tokens or share the model"
        raise ResourceError(f"a forward of {tokens} tokens does not fit in memory", fix)
    return [MicroBatch(batch) for batch in pack(groups, max_tokens=tokens // 2, indices=micro.batch.groups)]
