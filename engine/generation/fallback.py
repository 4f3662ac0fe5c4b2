"""Models that bypass transformers' attention interface: found by a probe, answered by their own `generate`.

Slow (prompts of equal length only, no refill), but the tokens come from the same seeded sampler.
"""

from __future__ import annotations

import logging
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

from macpo.engine.errors import ConfigError, Stopped
from macpo.engine.generation.context import DecodeAttention, PrefillAttention
from macpo.engine.generation.kv_cache import LayerShape, SlotCache
from macpo.engine.generation.rows import Row
from macpo.engine.generation.sampling import RowSampler
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.equivalence import expected_window
from macpo.engine.models.loading import embedding_rows
from macpo.engine.progress import Count

log = logging.getLogger(__name__)

PROBE_LENGTHS = (3, 6)
"""Tokens of the two probe sequences."""
STOP_TEXT_STEPS = 8
"""Steps between two looks for stop texts."""


def hooked_layers(model: PreTrainedModel) -> dict[int, LayerShape] | None:
    """What each layer caches, if packed prefill and cached decoding through the hook give the model's own logits.

    Two short sequences; the model must be in eval mode and gradients off. Else None, and one warning says why.
    """
    cache = SlotCache(len(PROBE_LENGTHS), max(PROBE_LENGTHS))
    try:
        why = _probe(model, cache)
    except (ConfigError, TypeError, ValueError) as error:
        why = str(error).removeprefix("error: ").splitlines()[0]
    if why:
        log.warning("%s is generated with by its own generate(), which is slower: %s", type(model).__name__, why)
        return None
    return cache.shapes()


def _probe(model: PreTrainedModel, cache: SlotCache) -> str:
    """What is wrong with the hooked forward over a cache for the probe's sequences; empty where nothing is."""
    window = expected_window(model)
    device = model.device
    vocabulary = embedding_rows(model)
    sequences = [(torch.arange(n, device=device) * 7 + n) % vocabulary for n in PROBE_LENGTHS]
    expected = torch.stack([model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in sequences]).float()
    lengths = [n - 1 for n in PROBE_LENGTHS]
    with attention_hook(model):
        prefill = PrefillAttention(cache, lengths, [[0], [1]], device)
        prompts = torch.cat([ids[:-1] for ids in sequences])[None]
        keywords: dict[str, Any] = {"use_cache": False}
        model(input_ids=prompts, position_ids=prefill.segments.positions()[None], attention_context=prefill, **keywords)
        num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        if cache.num_layers != num_layers:
            return f"{cache.num_layers} of its {num_layers} layers use transformers' attention interface"
        positions = torch.tensor(lengths, device=device)
        columns = torch.arange(cache.slot_tokens, device=device)
        decode = DecodeAttention(cache, torch.arange(2, device=device), positions, columns)
        last = torch.stack([ids[-1] for ids in sequences])[None]
        got = (
            model(input_ids=last, position_ids=positions[None], attention_context=decode, **keywords).logits[0].float()
        )
    if window is not None and window not in decode.windows:
        return f"its sliding window of {window} does not reach the attention interface"
    if not expected.isfinite().all():
        return ""  # generating will say so
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return "" if error <= tolerance else f"its logits through the attention interface differ by {error:.1e}"


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
