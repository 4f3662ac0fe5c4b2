"""Scores of responses: equal to separate forwards, whatever shares a row with them."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import ARCHITECTURES, model_of, separate_logps, some_groups

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.errors import DataError
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import ResponseScore, score
from macpo.engine.training.reference import reference_logps


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_scores_equal_separate_forwards(name: str) -> None:
    model = model_of(name)
    groups = some_groups(num_responses=3, count=6)
    # 40 tokens: several rows of several groups, in another order than given
    scores = [s for group in score(model, groups, max_tokens=40) for s in group]
    wanted = separate_logps(model, groups)
    assert len(scores) == len(wanted) == 18
    for got, want in zip(scores, wanted, strict=True):
        assert got.num_tokens == len(want)
        assert got.token_logps == pytest.approx(want.tolist(), rel=1e-5, abs=1e-5)
        assert got.sum_logp == pytest.approx(want.double().sum().item(), rel=1e-5)
        assert got.perplexity == pytest.approx(math.exp(-want.double().mean().item()), rel=1e-5)
        assert max(got.token_logps) <= 1e-6


def test_plain_tuples_and_row_budget_give_the_same_scores() -> None:
    policy = PolicyModule(model_of("llama"))
    groups = some_groups(count=6)
    one_row = score(policy, groups, max_tokens=10_000)
    alone = score(policy, [(g.prompt_ids, g.responses) for g in groups], max_tokens=1)
    for a, b in zip(one_row, alone, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.token_logps == pytest.approx(y.token_logps, rel=1e-5, abs=1e-5)
    assert reference_logps(one_row).shape == (6, 2)


def test_equal_calls_give_equal_bits() -> None:
    policy = PolicyModule(model_of("qwen3"))
    assert score(policy, some_groups(3)) == score(policy, some_groups(3))


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="has 65 tokens, the model has 64 positions"):
        score(model_of("llama"), [PrefixGroup([3] * 60, [[4], [4] * 5])])


def test_a_hopeless_response_has_infinite_perplexity_not_an_overflow() -> None:
    assert ResponseScore([-800.0], -800.0).perplexity == math.inf
    assert ResponseScore([-1.0, -3.0], -4.0).perplexity == pytest.approx(math.e**2)
