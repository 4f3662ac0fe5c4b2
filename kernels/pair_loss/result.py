"""The result of pair_loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairLoss(NamedTuple):
    """The loss and metrics to log. Only `loss` carries gradient. Float32; B pairs.

    `loss` and `sft_loss` are sums over this call's pairs divided by `num_pairs`, so those of micro-batches add up
    to the big batch's; `accuracy` and `margin` are means over this call's pairs.
    """

    loss: Tensor
    """Scalar: preference loss + sft_weight * sft_loss."""
    chosen_logps: Tensor
    """[B]: summed log-probs of the chosen responses."""
    rejected_logps: Tensor
    """[B]: summed log-probs of the rejected responses."""
    chosen_rewards: Tensor
    """[B]: beta * log-ratio of the chosen responses, with ld_alpha's weights where given; for simpo and orpo, which
    have no reference, beta * log-prob per token."""
    rejected_rewards: Tensor
    """[B]: as `chosen_rewards`, for the rejected responses."""
    accuracy: Tensor
    """Scalar: share of pairs whose chosen reward is the larger one."""
    margin: Tensor
    """Scalar: mean of chosen minus rejected reward."""
    sft_loss: Tensor
    """Scalar: token mean of the chosen NLL per pair, summed over pairs / num_pairs."""
