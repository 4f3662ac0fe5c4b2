"""Metrics on the held-out prompts.

Pure functions of plain numbers and texts: no model, no file. A higher value is better for `gold`,
`preference_accuracy`, `reward_margin` and `logp_margin`; the statistics of responses only describe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def response_stats(texts: Sequence[str], finished: Sequence[bool]) -> dict[str, float]:
    """Measure length and variety of one policy's responses.

    Returns `responses` (count), `mean_words` (blank-separated), `finished` and `empty` (shares in [0, 1]) and
    `distinct_1..3`: distinct n-grams over all n-grams of all responses together (Li et al. 2016, arXiv 1510.03055).
    Distinct-n falls with the number of words, so compare only policies that answered the same prompts.

    Raises ValueError when the two sequences differ in length.
    """
    if len(texts) != len(finished):
        raise ValueError(f"{len(texts)} texts but {len(finished)} finished flags")
    words = [text.split() for text in texts]
    count = max(len(texts), 1)
    stats: dict[str, float] = {
        "answers": len(texts),
        "mean_words": sum(map(len, words)) / count,
        "finished": sum(map(bool, finished)) / count,
        "empty": sum(not response for response in words) / count,
    }
    for n in (1, 2, 3):
        grams = [tuple(response[i : i + n]) for response in words for i in range(len(response) - n + 1)]
        stats[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return stats


def preference_metrics(
    chosen_logps: Sequence[float],
    rejected_logps: Sequence[float],
    base_chosen_logps: Sequence[float],
    base_rejected_logps: Sequence[float],
    *,
    beta: float,
    chosen_tokens: Sequence[int] | None = None,
    rejected_tokens: Sequence[int] | None = None,
) -> dict[str, float]:
    """Measure how well a policy tells chosen from rejected responses, on pairs that it never trained on.

    Arguments are one number a pair: summed response log-probs (nats) under the policy pi and under its own base model,
    the model before any alignment. The implicit reward is beta * (log pi - log pi_base) (DPO, Rafailov et al. 2023,
    arXiv 2305.18290, equation 5 without its prompt-only term, which cancels inside a pair). So the base model itself
    scores exactly 0.5, and agents with different bases and tokenizers can be compared.

    Returns
        `preference_accuracy`: share of pairs whose chosen response has the higher reward, a tie counting half
        (TRL counts a tie as wrong), with its standard error `preference_accuracy_se`;
        `reward_margin`: mean reward of chosen minus rejected;
        `logp_margin`: mean log pi(chosen) - log pi(rejected), without the base, so it also prefers short responses;
        `logp_margin_per_token` where both token counts are given; `preference_pairs`: their number.

    Raises ValueError on unequal lengths, no pair, or a log-prob that is not finite.
    """
    columns = (chosen_logps, rejected_logps, base_chosen_logps, base_rejected_logps)
    if len({len(column) for column in columns}) != 1 or not len(chosen_logps):
        raise ValueError(f"needs one or more pairs, equally many in each column; got {[len(c) for c in columns]}")
    if not all(math.isfinite(value) for column in columns for value in column):
        raise ValueError("a log-prob is not finite")
    rewards = [beta * ((c - bc) - (r - br)) for c, r, bc, br in zip(*columns, strict=True)]
    accuracy, accuracy_se = mean_and_se([(reward > 0) + 0.5 * (reward == 0) for reward in rewards])
    metrics = {
        "preference_accuracy": accuracy,
        "preference_accuracy_se": accuracy_se,
        "reward_margin": math.fsum(rewards) / len(rewards),
        "logp_margin": math.fsum(c - r for c, r in zip(chosen_logps, rejected_logps, strict=True)) / len(rewards),
        "preference_pairs": len(rewards),
    }
    if chosen_tokens is not None and rejected_tokens is not None:
        per_token = [
            c / max(nc, 1) - r / max(nr, 1)
            for c, nc, r, nr in zip(chosen_logps, chosen_tokens, rejected_logps, rejected_tokens, strict=True)
        ]
        metrics["logp_margin_per_token"] = math.fsum(per_token) / len(per_token)
    return metrics


def gold_mean(scores: Sequence[float]) -> dict[str, float]:
    """Return the mean of an exact scorer's values over the test prompts, its standard error, and their number.

    Raises ValueError without a score.
    """
    mean, error = mean_and_se(scores)
    return {"gold": mean, "gold_se": error, "gold_answers": len(scores)}


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (sample deviation / sqrt n; 0 for one value)."""
    if not len(values):
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
