"""sample in torch, fast on CPUs: top-k first, so that softmax, sort and noise see k columns instead of V.

Rows are handled by their top_k, each row by itself, so a row's result does not depend on the others.
Legend: b rows, v vocabulary, k kept columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.philox import gumbel, token_words


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw log-probs [B], processed log-probs [B]; see `op.sample`."""
    logits = logits.float()
    raw_bv = logits.log_softmax(dim=-1)
    scores = _penalised(logits, params)
    if params.facts["greedy"]:
        ids = scores.argmax(dim=-1)
        return ids, raw_bv.gather(1, ids[:, None]).squeeze(1), torch.zeros_like(ids, dtype=torch.float32)

    batch = logits.shape[0]
    ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    processed = torch.empty(batch, dtype=torch.float32, device=logits.device)
    for top_k in params.facts["top_ks"]:
        if len(params.facts["top_ks"]) == 1:
            ids, processed = _draw(scores, params, request_keys, positions, top_k)
        else:
            rows = (params.top_k == top_k).nonzero().squeeze(1)
            ids[rows], processed[rows] = _draw(
                scores[rows], params.select(rows), request_keys[rows], positions[rows], top_k
            )
    if params.facts["any_greedy"]:
        greedy = params.temperature == 0
        ids = torch.where(greedy, scores.argmax(dim=-1), ids)
        processed = processed.masked_fill(greedy, 0.0)
    return ids, raw_bv.gather(1, ids[:, None]).squeeze(1), processed


def _penalised(logits: Tensor, params: SampleParams) -> Tensor:
    if not params.facts["penalised"] or params.seen is None:
        return logits
    penalty = params.repetition_penalty[:, None]
    return torch.where(params.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _draw(
    scores: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Token ids and processed log-probs of rows that share a top_k; greedy rows get a draw that is thrown away."""
    temperature = torch.where(params.temperature == 0, 1.0, params.temperature)
    scores = scores / temperature[:, None]
    kept, tokens = _columns(scores, top_k)
    if params.facts["top_p"]:
        kept = _nucleus(kept, params.top_p)
    if params.facts["min_p"]:
        relative = (kept - kept.max(dim=-1, keepdim=True).values).exp()
        kept = kept.masked_fill(relative < params.min_p[:, None], float("-inf"))
    noise = gumbel(token_words(params.seed, request_keys, positions, tokens))
    choice = (kept + noise).argmax(dim=-1, keepdim=True)
    processed = kept.log_softmax(dim=-1).gather(1, choice)
    return tokens.gather(1, choice).squeeze(1), processed.squeeze(1)


def _columns(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The columns that top-k leaves, by rising token id: scores and token ids, both [B, K].

    Tokens that tie with the k-th all stay, as Hugging Face has it; then every column is kept and masked.
    """
    batch, vocab = scores.shape
    if 0 < top_k < vocab:
        top = scores.topk(top_k + 1, dim=-1)
        if not bool((top.values[:, -1] == top.values[:, -2]).any()):
            tokens = top.indices[:, :-1].sort(dim=-1).values
            return scores.gather(1, tokens), tokens
        scores = scores.masked_fill(scores < top.values[:, -2:-1], float("-inf"))
    return scores, torch.arange(vocab, device=scores.device).expand(batch, vocab)


def _nucleus(kept: Tensor, top_p: Tensor) -> Tensor:
    """Scores [B, K] with everything outside the nucleus at -inf; the rule is `reference.scores_and_support`'s."""
    order = kept.flip(1).sort(dim=-1, descending=True, stable=True)
    columns = kept.shape[1] - 1 - order.indices
    probs = order.values.softmax(dim=-1).double()
    outside = (probs.cumsum(dim=-1) - probs >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return kept.masked_fill(torch.zeros_like(outside).scatter(1, columns, outside), float("-inf"))
