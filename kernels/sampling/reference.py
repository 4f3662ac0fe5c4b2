"""sample over the whole vocabulary: the definition that every backend is tested against.

Legend: b rows, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.philox import gumbel, token_words


def scores_and_support(logits: Tensor, params: SampleParams) -> tuple[Tensor, Tensor]:
    """Penalised and tempered scores [B, V] float32 and the mask of kept tokens, in Hugging Face's order.

    Repetition penalty, temperature, top-k, top-p, min-p. At temperature 0 the scores are not tempered and the
    one kept token is the first of the largest.
    """
    scores = logits.float()
    if params.seen is not None:
        penalty = params.repetition_penalty[:, None]
        scores = torch.where(params.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    greedy = (params.temperature == 0)[:, None]
    scores = scores / torch.where(greedy, torch.ones_like(greedy, dtype=torch.float32), params.temperature[:, None])

    vocab = scores.shape[1]
    top_k = torch.where(params.top_k == 0, vocab, params.top_k).clamp(max=vocab)
    kth = scores.sort(dim=-1, descending=True).values.gather(1, top_k[:, None] - 1)
    keep = scores >= kth

    # Nucleus, from the most likely down: a token stays while less than top_p lies above it. Among equals the higher
    # id ranks first, which is what Hugging Face's ascending sort amounts to.
    order = scores.masked_fill(~keep, float("-inf")).flip(1).sort(dim=-1, descending=True, stable=True)
    ranked_ids = vocab - 1 - order.indices
    probs = order.values.softmax(dim=-1).double()
    above = probs.cumsum(dim=-1) - probs
    off = (params.top_p >= 1)[:, None]
    nucleus = torch.zeros_like(keep).scatter(1, ranked_ids, (above < params.top_p[:, None]) | off)
    nucleus.scatter_(1, ranked_ids[:, :1], True)
    keep &= nucleus

    relative = (scores - scores.max(dim=-1, keepdim=True).values).exp()  # p / p of the best token
    keep &= relative >= params.min_p[:, None]

    first = torch.zeros_like(keep).scatter(1, scores.argmax(dim=-1, keepdim=True), True)
    return scores, torch.where(greedy, first, keep)


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw log-probs [B], processed log-probs [B]; see `op.sample`."""
    scores, keep = scores_and_support(logits, params)
    kept = scores.masked_fill(~keep, float("-inf"))
    vocabulary = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
    noise = gumbel(token_words(params.seed, request_keys, positions, vocabulary))
    ids = (kept + noise).argmax(dim=-1, keepdim=True)
    raw = logits.float().log_softmax(dim=-1).gather(1, ids)
    processed = kept.log_softmax(dim=-1).gather(1, ids)
    return ids.squeeze(1), raw.squeeze(1), processed.squeeze(1)
