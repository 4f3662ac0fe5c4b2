"""Models that bypass transformers' attention interface: found by a probe, answered by their own `generate`.

Slow (prompts of equal length only, no refill), but the tokens come from the same seeded sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from macpo.engine.errors import Stopped
from macpo.engine.generation.sampling import RowSampler
from macpo.engine.generation.sequence import Row
from macpo.engine.progress import Count

STOP_TEXT_STEPS = 8
"""Steps between two looks for stop texts."""


class HfRunner:
    """Static batches through the model's own `generate`, with our sampler as its logits processor."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_batch: int,
        num_tokens: int,
        tokenizer: object,
        should_stop: Callable[[], bool],
        count: Count,
    ) -> None:
        self.model = model
        self.count = count
        self.max_batch = max_batch
        self.num_tokens = num_tokens
        self.tokenizer = tokenizer
        self.should_stop = should_stop

    def run(self, rows: Sequence[Row], on_done: Callable[[Row], None]) -> None:
        """Answers all rows, longest prompt first, ties by id."""

        def length(row: Row) -> int:
            return -len(row.request.prompt_ids)

        order = sorted(rows, key=lambda row: (length(row), row.request.id, row.sample))
        for _, same in groupby(order, key=length):
            equal = list(same)
            for start in range(0, len(equal), self.max_batch):
                batch = equal[start : start + self.max_batch]
                self._generate(batch)
                for row in batch:
                    on_done(row)

    def _generate(self, rows: Sequence[Row]) -> None:
        ids = torch.tensor([row.request.prompt_ids for row in rows], device=self.model.device)
        inner = RowSampler(rows, self.num_tokens, self.model.device)
        sampler = _Sampler(rows, inner, self.tokenizer, self.should_stop, self.count)
        own, self.model.generation_config = (
            self.model.generation_config,
            GenerationConfig(),
        )  # its filters must not apply
        try:
            model: Any = self.model
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_AllDone(rows)]),
                max_new_tokens=max(row.budget for row in rows),
                do_sample=False,
            )
        finally:
            self.model.generation_config = own


class _Sampler(LogitsProcessor):
    """Draws the token and leaves `generate` no other choice."""

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: RowSampler,
        tokenizer: object,
        should_stop: Callable[[], bool],
        count: Count,
    ) -> None:
        self.rows = rows
        self.count = count
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.should_stop = should_stop
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.should_stop():
            raise Stopped("stopped while generating", "run the same command again")
        tokens, raw_logps, logps = self.sampler(scores)
        self.step += 1
        look = self.step % STOP_TEXT_STEPS == 0
        columns = (column[:, None].tolist() for column in (tokens, raw_logps, logps))
        num_new = 0
        for row, *new in zip(self.rows, *columns, strict=True):
            num_new += row.extend(*new)
            if look and row.params.stop and not row.done:
                row.done = row.stopped_in_tail(self.tokenizer, STOP_TEXT_STEPS)
        self.count(tokens=num_new)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


class _AllDone(StoppingCriteria):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)
