"""A causal LM whose output layer is a score head: one number a response, r = w · h[its last token].

T tokens of a packed row, R responses, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError
from macpo.engine.models.policy import PolicyModule


class RewardModule(PolicyModule):
    """A policy made a reward model, in place: its output layer gives way to a score head of one row, zero at first.

    The head is float32 whatever the model computes in, and every rank holds all of it. A prompt is computed once for
    all its responses, and no vocabulary is ever multiplied with.

    Args:
        policy: with an adapter or with all weights to train, before `parallelize`.

    Raises:
        ConfigError: an adapter on the output layer that goes.
    """

    def __init__(self, policy: PolicyModule) -> None:
        super().__init__(policy.model, compute_dtype=policy.compute_dtype, home=policy.home)
        if isinstance(self.base.get_output_embeddings(), LoraLayer):
            problem = "an adapter on the output layer, which a reward model replaces by its score head"
            raise ConfigError(problem, "leave it out of target_modules", field="target_modules")
        self.score: Any = nn.Linear(hidden_size(self.base.config), 1, bias=False, dtype=torch.float32, device=self.home)
        nn.init.zeros_(self.score.weight)
        self.base.config.tie_word_embeddings = False  # the embedding stays as it is
        self.base.set_output_embeddings(self.score)

    @property
    def unsharded(self) -> set[nn.Parameter]:
        return {self.score.weight}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name in a fixed order, last of all `score.weight`."""
        others = super().trainable_parameters()
        kept = {name: parameter for name, parameter in others.items() if parameter is not self.score.weight}
        return kept | {"score.weight": self.score.weight}

    def forward(self, batch: PackedBatch, *_: Any) -> Tensor:  # type: ignore[override]
        """The rewards of the batch's responses, in the order of groups and responses: [R] float32.

        Raises:
            DataError: a prompt with its response exceeds the model's positions.
        """
        batch = self.ready(batch)
        last = self.hidden(batch)[batch.last]  # [R, H]
        rewards: Tensor = self.score(last.float())
        return rewards[:, 0]


def hidden_size(config: Any) -> int:
    """The width of the hidden states that a model's output layer reads."""
    return int(config.get_text_config().hidden_size)
