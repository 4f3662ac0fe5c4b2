"""The load-balancing loss of mixtures of experts, which transformers adds in training where the configuration asks.

transformers computes it once a forward, over all tokens of the batch that it happens to get. Here it is computed for
each group (a prompt with its responses, every token once) and averaged over the groups of a step with the weights that
the objective gives them, so that micro-batches and ranks only split a sum.

T tokens of a packed row, E experts, G groups of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.models.support import ROUTER_OFF, router_loss_coefficient


@dataclass(frozen=True, slots=True)
class Router:
    """What the load-balancing loss of a model depends on besides its router's logits."""

    coefficient: float
    """Factor of the loss in what is minimised."""
    num_experts: int
    num_chosen: int
    """Experts that a token is routed to."""


def router_of(model: PreTrainedModel) -> Router | None:
    """The model's router, or None if training adds no load-balancing loss.

    Raises:
        ConfigError: the configuration asks for the loss, but the model does not say how many experts it has.
    """
    coefficient = router_loss_coefficient(model.config)
    if not coefficient:
        return None
    num_experts, num_chosen = (getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if not isinstance(num_experts, int) or not isinstance(num_chosen, int):
        raise ConfigError(f"{type(model).__name__} has a load-balancing loss that is not known here", ROUTER_OFF)
    return Router(coefficient, num_experts, num_chosen)


@contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collect the router's logits of every forward in the block: for each forward a tuple of [T, E] by layer.

    Raises:
        ConfigError: from a forward that returns none.
    """
    found: list[tuple[Tensor, ...]] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        logits = getattr(out, "router_logits", None)
        if not logits:
            raise ConfigError(f"{type(model).__name__} does not return the logits of its router", ROUTER_OFF)
        found.append(logits)

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def balance(logits: Sequence[Tensor], group_of: Tensor, num_groups: int, router: Router) -> Tensor:
    """The load-balancing loss of each group: [G] float32, num_chosen where the experts are used alike.

    E times the sum over experts of (share of the group's choices that fell on it, times num_chosen) and its mean
    probability, both over the group's tokens and all layers; the gradient flows through the probabilities alone. Equal
    to `load_balancing_loss_func` of transformers on the tokens of the group.

    Args:
        logits: [T, E] by layer.
        group_of: [T] int64, index of the token's group.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6.
    """
    shape = (num_groups, router.num_experts)
    chosen = logits[0].new_zeros(shape, dtype=torch.float32)
    probabilities = chosen
    for layer in logits:
        weights = layer.float().softmax(-1)
        picked = weights.topk(router.num_chosen, dim=-1).indices
        chosen = chosen.index_add(0, group_of, torch.zeros_like(weights).scatter_(1, picked, 1.0))
        probabilities = probabilities.index_add(0, group_of, weights)
    rows = len(logits) * group_of.bincount(minlength=num_groups)[:, None]
    return router.num_experts * (chosen / rows * (probabilities / rows)).sum(1)
