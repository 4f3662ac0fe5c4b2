"""pair_loss over row chunks: loss and gradients in one pass over the vocabulary. For every backend.

With u = one head GEMM over all rows:
- nothing to differentiate: 1u, nothing kept;
- frozen head: 2u; d W is formed chunk by chunk, and its rows are scaled by g once all sums are known;
- trained head: 3u; a block holds whole pairs, so g of its rows is known before they go into dW;
- trained head, for the rows of a pair longer than a block: 4u; their logits are computed again once g is known.
A block is a chunk, or several whose d is kept in 16 bits (`Head.block_rows`).
g = d loss / d log-prob of each row, for an upstream gradient of 1, by which the backward multiplies.
Legend: n rows, s sequences, b pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from macpo.kernels.linear_logp.head import Gradients, Head, Needs, chunks
from macpo.kernels.pair_loss.losses import LOSSES, REFERENCE_FREE, LossSettings, PairScores, sft
from macpo.kernels.pair_loss.sequences import row_sequences, row_weights, segment_sums
from macpo.kernels.transfer import to_device


class Pairs:
    """The pairs of a call, which turn log-probs of their rows into losses and slopes, a few pairs at a time.

    Args:
        bounds: where each sequence's rows begin, from 0 to N.
        ref_s: summed reference log-probs, or None.
        settings: the loss and its parameters.
        num_pairs: divisor of the sums over pairs.
        like: a tensor on the device, of the dtype of log-probs.
    """

    def __init__(
        self, bounds: list[int], ref_s: Tensor | None, settings: LossSettings, num_pairs: int, like: Tensor
    ) -> None:
        self.bounds, self.settings, self.num_pairs = bounds, settings, num_pairs
        device = like.device
        self.ref_s = None if ref_s is None else to_device(ref_s, device).to(like.dtype)
        self.lengths_s = to_device(torch.tensor(bounds).diff(), device)
        self.sequence_n = to_device(row_sequences(bounds), device)
        self.weight_n = None
        if settings.ld_alpha is not None:
            self.weight_n = to_device(row_weights(bounds, settings.ld_alpha), device).to(like.dtype)

    def __len__(self) -> int:
        return len(self.bounds) // 2

    def rows(self, first: int, last: int) -> slice:
        """Rows of the pairs first .. last - 1."""
        return slice(self.bounds[2 * first], self.bounds[2 * last])

    def sums(self, logp_n: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Summed log-probs [2b] of the pairs first .. last - 1, from all rows' [N]: plain, and by the rows' weights."""
        part, lengths_s = self.rows(first, last), self.lengths_s[2 * first : 2 * last]
        plain_s = segment_sums(logp_n[part], lengths_s)
        if self.weight_n is None:
            return plain_s, plain_s
        return plain_s, segment_sums(logp_n[part] * self.weight_n[part], lengths_s)

    def ratios(self, weighted_s: Tensor, first: int, last: int) -> Tensor:
        return weighted_s if self.ref_s is None else weighted_s - self.ref_s[2 * first : 2 * last]

    def terms(self, plain_s: Tensor, weighted_s: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each pair's share of the loss [b], preference and SFT term over `num_pairs`; and its derivatives with
        respect to the weighted [2b] and the plain sums of the chosen [b]."""
        ratios_s, tokens_s = self.ratios(weighted_s, first, last), self.tokens(first, last, plain_s.dtype)
        scores = PairScores(ratios_s[0::2], ratios_s[1::2], tokens_s[0::2], tokens_s[1::2])
        loss_b, dchosen_b, drejected_b = LOSSES[self.settings.loss](scores, self.settings)
        dweighted_s = torch.stack([dchosen_b, drejected_b], dim=1).flatten() / self.num_pairs
        dplain_b = torch.zeros_like(loss_b)
        if self.settings.sft_weight:
            loss_b = loss_b + self.settings.sft_weight * sft(plain_s[0::2], tokens_s[0::2])
            dplain_b = -self.settings.sft_weight / (tokens_s[0::2] * self.num_pairs)
        return loss_b / self.num_pairs, dweighted_s, dplain_b

    def tokens(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.lengths_s[2 * first : 2 * last].to(dtype)

    def row_grads(self, logp_n: Tensor, first: int, last: int) -> Tensor:
        """g [n] of the rows of the pairs first .. last - 1."""
        _, dweighted_s, dplain_b = self.terms(*self.sums(logp_n, first, last), first, last)
        dplain_s = torch.stack([dplain_b, torch.zeros_like(dplain_b)], dim=1).flatten()
        part = self.rows(first, last)
        sequence_n = self.sequence_n[part] - 2 * first
        if self.weight_n is None:
            return (dplain_s + dweighted_s)[sequence_n]
        return dplain_s[sequence_n] + dweighted_s[sequence_n] * self.weight_n[part]

    def rewards(self, weighted_s: Tensor) -> Tensor:
        """[2B]: beta times the log-ratio, per token for losses without a reference."""
        rewards_s = self.settings.beta * self.ratios(weighted_s, 0, len(self))
        return rewards_s / self.lengths_s if self.settings.loss in REFERENCE_FREE else rewards_s

    def groups(self, block_rows: int) -> Iterator[tuple[int, int]]:
        """Runs of whole pairs that fit a block together; a pair that fits none is alone."""
        first = 0
        for pair in range(len(self)):
            if pair > first and self.bounds[2 * pair + 2] - self.bounds[2 * first] > block_rows:
                yield first, pair
                first = pair
        yield first, len(self)


@dataclass(frozen=True, slots=True)
class Result:
    """Scalars, sums a sequence [2B], and gradients of every input for an upstream gradient of 1."""

    loss: Tensor
    sft_loss: Tensor
    logps: Tensor
    rewards: Tensor
    grad_n: Tensor | None
    """g [N] times the rows' own factors; d loss / d hidden is `grads.hidden` times it, by rows."""
    grads: Gradients
    """Gradients of the inputs; those of weight, bias and LoRA are `grad_scale` times too large."""
    grad_scale: float


def pair_loss(head: Head, hidden: Tensor, target: Tensor, pairs: Pairs, needs: Needs, chunk_rows: int) -> Result:
    """Loss and gradients; see `op.pair_loss`, and `library.py` for the way back."""
    logp_n = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
    block_rows = head.block_rows(hidden.shape[0], chunk_rows, needs)
    grads = Gradients(head, hidden, needs, whole=hidden.shape[0] <= block_rows)
    # g is about beta / num_pairs, which times hidden may be too small for float16. A power of two rounds nothing.
    narrow = head.weight_vh.dtype == torch.float16
    grad_scale = 2.0 ** round(math.log2(pairs.num_pairs / pairs.settings.beta)) if narrow else 1.0
    grad_n = None
    if needs.head:
        grad_n = torch.empty_like(logp_n)
        block = head.block(hidden.shape[0], chunk_rows, needs)
        buffer = head.chunk_buffer(block, min(hidden.shape[0], chunk_rows))
        for first, last in pairs.groups(block_rows):
            part = pairs.rows(first, last)
            if part.stop - part.start <= block_rows:
                found = head.differentiate(hidden[part], target[part], buffer, block)
                logp_n[part] = found.logp_n
                grad_n[part] = pairs.row_grads(logp_n, first, last)
                grads.add(part, found, grad_n[part] * grad_scale)
            else:
                _long_pair(head, hidden, target, pairs, first, chunk_rows, buffer, logp_n, grad_n, grads, grad_scale)
    else:
        if not needs.hidden:
            chunk_rows = head.score_rows(chunk_rows)
        buffer = head.buffer(min(hidden.shape[0], chunk_rows), score=not needs.hidden)
        for part in chunks(0, hidden.shape[0], chunk_rows):
            if needs.hidden:
                found = head.differentiate(hidden[part], target[part], buffer)
                logp_n[part] = found.logp_n
                grads.add(part, found)
            else:
                logp_n[part], _ = head.score(hidden[part], target[part], buffer)
        if needs.hidden:
            grad_n = pairs.row_grads(logp_n, 0, len(pairs))
    if grad_n is not None:
        grad_n = grads.row_factors(grad_n)
    plain_s, weighted_s = pairs.sums(logp_n, 0, len(pairs))
    return Result(
        loss=pairs.terms(plain_s, weighted_s, 0, len(pairs))[0].sum(),
        sft_loss=sft(plain_s[0::2], pairs.lengths_s[0::2]).sum() / pairs.num_pairs, logps=plain_s,
        rewards=pairs.rewards(weighted_s), grad_n=grad_n, grads=grads, grad_scale=grad_scale,
    )  # fmt: skip


def _long_pair(
    head: Head, hidden: Tensor, target: Tensor, pairs: Pairs, pair: int, chunk_rows: int, buffer: Tensor,
    logp_n: Tensor, grad_n: Tensor, grads: Gradients, grad_scale: float,
) -> None:  # fmt: skip
    """Handle one pair in several chunks: log-probs of all its rows first, then their logits again."""
    rows = pairs.rows(pair, pair + 1)
    lse_n = torch.empty_like(logp_n)
    for part in chunks(rows.start, rows.stop, chunk_rows):
        logp_n[part], lse_n[part] = head.score(hidden[part], target[part], buffer)
    grad_n[rows] = pairs.row_grads(logp_n, pair, pair + 1)
    for part in chunks(rows.start, rows.stop, chunk_rows):
        found = head.differentiate_again(hidden[part], target[part], lse_n[part], buffer)
        grads.add(part, found, grad_n[part] * grad_scale)


def check_bounds(cu_rows: Tensor, num_rows: int) -> list[int]:
    """cu_rows as a list; ValueError unless it grows strictly from 0 to `num_rows`."""
    bounds: list[int] = cu_rows.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_rows must grow strictly from 0 to N = {num_rows}, got {bounds}")
    return bounds
