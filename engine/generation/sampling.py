"""Sampling state of a batch, and the one call of the sampling operator.

B rows, V vocabulary entries up to the last that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.generation.params import SamplingParams
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.vocabulary import Columns, Vocabulary
from macpo.kernels import SampleParams, sample
from macpo.kernels.transfer import to_device


class RowSampler:
    """Draws the next token of a fixed batch; built again when the batch changes."""

    def __init__(
        self, rows: Sequence[ActiveSequence], vocabulary: Vocabulary, device: torch.device, team: World = ALONE
    ) -> None:
        self.columns = vocabulary.on(device)
        self.team = team
        settings = [row.params for row in rows]
        seen = None
        if penalised(settings):
            seen = torch.zeros(len(rows), vocabulary.num_tokens, dtype=torch.bool, device=device)
            mark_seen(seen, rows)
        self.params = sample_params(settings, seen, device)
        self.keys = to_device(torch.tensor([noise_key(row) for row in rows], dtype=torch.int64), device)
        self.counts = to_device(torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64), device)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, W >= V] -> token ids int64 [B], raw and processed log-probs float32 [B]."""
        return draw(logits, self.columns, self.params, self.keys, self.counts, self.team)


def draw(
    logits: Tensor, columns: Columns, params: SampleParams, keys: Tensor, counts: Tensor, team: World = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row; updates `params.seen` and `counts` in place.

    Args:
        logits: [B, W >= columns.num_tokens] float.
        columns: which ids may be drawn.
        keys: [B, 3] int64 (`noise_key`); counts: [B] int64, tokens of each response so far.
        team: the tensor-parallel group, whose ranks have the same logits: all take what its first rank draws.

    Returns:
        Token ids int64 [B], raw and processed log-probs float32 [B]; does not wait for the device.
    """
    drawable = columns.drawable(logits)
    tokens, raw_logps, logps = sample(drawable, params, keys, counts)
    if columns.holes is not None or logits.shape[1] > columns.num_tokens:  # raw log-probs are those of the whole head
        drawn_logit = logits.gather(1, tokens[:, None])[:, 0].float()
        # log(1 + others / drawable), where the drawable ones' logsumexp follows from what was drawn
        raw_logps = raw_logps - functional.softplus(columns.others(logits) - (drawn_logit - raw_logps))
    team.follow_(tokens, raw_logps, logps)
    if params.seen is not None:
        params.seen.scatter_(1, tokens[:, None], True)
    counts += 1
    return tokens, raw_logps, logps


def sample_params(settings: Sequence[SamplingParams], seen: Tensor | None, device: torch.device) -> SampleParams:
    """The sampling operator's settings, one row per element of `settings`."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor([getattr(one, name) for one in settings], dtype=dtype), device)

    return SampleParams(
        seed=column("seed", torch.int64),
        temperature=column("temperature", torch.float32),
        top_p=column("top_p", torch.float32),
        top_k=column("top_k", torch.int64),
        min_p=column("min_p", torch.float32),
        repetition_penalty=column("repetition_penalty", torch.float32),
        seen=seen,
    )


def penalised(settings: Sequence[SamplingParams]) -> bool:
    """Whether some sequence has a repetition penalty, which needs to know its tokens."""
    return any(one.repetition_penalty != 1.0 for one in settings)


def noise_key(row: ActiveSequence) -> tuple[int, int, int]:
    """The sequence's part of the noise counter, besides its seed and position."""
    return row.request.key, row.sample, row.request.attempt


def mark_seen(seen: Tensor, rows: Sequence[ActiveSequence]) -> None:
    """Marks prompt and response tokens of the penalised rows in seen [>= rows, V], in place."""
    marked = [(i, row) for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not marked:
        return
    ids = [torch.tensor([*row.request.prompt_ids, *row.tokens]) for _, row in marked]
    at = torch.tensor([i for i, _ in marked]).repeat_interleave(torch.tensor(list(map(len, ids))))
    pairs = torch.stack((at, torch.cat(ids)))
    at, token = to_device(pairs[:, pairs[1] < seen.shape[1]], seen.device)
    seen[at, token] = True
