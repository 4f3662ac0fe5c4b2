"""Vocabulary: which columns of a head are ids that the tokenizer has, and may therefore be drawn.

A head is often wider than its tokenizer (rows that pad the embeddings to a multiple of 64), and a tokenizer's ids need
not be contiguous: tokens may be missing among them, and added tokens may lie far above the others. Its length says
neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macpo.engine.errors import ConfigError
from macpo.engine.models.loading import embedding_rows

NEVER = -1e30
"""Logit of an id that is not drawn. It is finite because the sampling operator reads infinite logits as broken; its
probability is exactly 0 in float32 at every temperature."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids below `num_tokens` that lie in none of `holes`, which are in ascending order."""

    num_tokens: int
    holes: tuple[range, ...] = ()

    @classmethod
    def of(cls, width: int, tokenizer: Any = None) -> Vocabulary:
        """The ids of a head with `width` columns that the tokenizer has; without a tokenizer, all of them.

        Raises:
            ConfigError: the head has none of the tokenizer's ids, or lacks its end token.
        """
        if tokenizer is None:
            return cls(width)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is not None and end >= width:
            problem = f"the tokenizer's end token has id {end}, and the model's head {width} columns"
            raise ConfigError(problem, "use the model's own tokenizer, or resize the embeddings", field="tokenizer")
        return cls.from_ids(i for i in tokenizer.get_vocab().values() if i < width)

    @classmethod
    def from_ids(cls, ids: Iterable[int]) -> Vocabulary:
        """The vocabulary that has just these ids. Raises ConfigError where there are none."""
        kept = sorted(set(ids))
        if not kept:
            fix = "use the model's own tokenizer"
            raise ConfigError("the model has none of the tokenizer's ids", fix, field="tokenizer")
        holes = (range(low + 1, high) for low, high in pairwise([-1, *kept]) if high > low + 1)
        return cls(kept[-1] + 1, tuple(holes))

    def on(self, device: torch.device) -> Columns:
        """The vocabulary as the sampler on this device uses it."""
        if not self.holes:
            return Columns(self.num_tokens, None)
        ids = torch.cat([torch.arange(hole.start, hole.stop) for hole in self.holes])
        return Columns(self.num_tokens, ids.to(device))


class Columns(NamedTuple):
    """The columns of logits that may be drawn."""

    num_tokens: int
    holes: Tensor | None
    """int64 [H]: columns below `num_tokens` that may not."""

    def drawable(self, logits: Tensor) -> Tensor:
        """logits [B, W >= num_tokens] -> [B, num_tokens], in which holes have probability 0; a view where it can be."""
        kept = logits[:, : self.num_tokens]
        return kept if self.holes is None else kept.float().index_fill(1, self.holes, NEVER)

    def others(self, logits: Tensor) -> Tensor:
        """The logsumexp [B] float32 of the columns of logits [B, W] that may not be drawn, of which there are some."""
        tail = logits[:, self.num_tokens :]
        if self.holes is None:
            return tail.float().logsumexp(-1)
        return torch.cat((tail, logits.index_select(1, self.holes)), 1).float().logsumexp(-1)


def check_vocab(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if the tokenizer can produce an id that the model has no embedding for."""
    rows = embedding_rows(model)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > rows:
        raise ConfigError(
            f"the tokenizer has ids up to {needed - 1} (vocabulary {needed}) but the model has {rows} embedding rows",
            "use the model's own tokenizer, or resize the model's embeddings",
        )
