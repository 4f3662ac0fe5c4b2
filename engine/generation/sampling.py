"""Per-row sampling state of a batch, and the one call of the sampling operator.

B rows, V vocabulary entries that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from macpo.engine.generation.rows import Row
from macpo.kernels import SampleParams, sample


class RowSampler:
    """Draws the next token of fixed rows; made anew when the batch changes."""

    def __init__(self, rows: Sequence[Row], num_tokens: int, device: torch.device) -> None:
        """num_tokens: ids at or above it are never drawn (a head wider than the tokenizer)."""
        params = [row.params for row in rows]

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        self.num_tokens = num_tokens
        self.penalised = any(p.repetition_penalty != 1.0 for p in params)
        self.params = SampleParams(
            seed=column("seed", torch.int64),
            temperature=column("temperature", torch.float32),
            top_p=column("top_p", torch.float32),
            top_k=column("top_k", torch.int64),
            min_p=column("min_p", torch.float32),
            repetition_penalty=column("repetition_penalty", torch.float32),
            seen=self._seen(rows, device) if self.penalised else None,
        )
        keys = [(row.request.key, row.sample, row.request.attempt) for row in rows]
        self.keys = torch.tensor(keys, dtype=torch.int64, device=device)
        self.counts = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64, device=device)
        self._index = torch.arange(len(rows), device=device)

    def _seen(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        seen = torch.zeros(len(rows), self.num_tokens, dtype=torch.bool)
        for mine, row in zip(seen, rows, strict=True):
            if row.params.repetition_penalty != 1.0:
                ids = torch.tensor([*row.request.prompt_ids, *row.tokens])
                mine[ids[ids < self.num_tokens]] = True
        return seen.to(device)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, W >= V] -> token ids int64 [B], raw and processed log-probs float32 [B]."""
        drawable = logits[:, : self.num_tokens]
        tokens, raw_logps, logps = sample(drawable, self.params, self.keys, self.counts)
        if logits.shape[1] > self.num_tokens:  # raw log-probs are those of the whole head
            raw_logps = raw_logps + drawable.float().logsumexp(-1) - logits.float().logsumexp(-1)
        if self.params.seen is not None:
            self.params.seen[self._index, tokens] = True
        self.counts += 1
        return tokens, raw_logps, logps
