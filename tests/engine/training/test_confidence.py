"""The confidence loss against its definition in float64, and what packing and the schedule do to it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.policy import PolicyModule
from macpo.engine.training.confidence import confident_sft, medians

VOCAB = 40


@pytest.fixture(scope="module")
def policy() -> PolicyModule:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return PolicyModule(model)


def groups(*lengths: int) -> list[PrefixGroup]:
    draw = random.Random(1)
    return [
        PrefixGroup([draw.randrange(3, VOCAB) for _ in range(4)], [[draw.randrange(3, VOCAB) for _ in range(n)]])
        for n in lengths
    ]


def by_definition(policy: PolicyModule, examples: list[PrefixGroup], share: float) -> torch.Tensor:
    """The mean over response tokens, one example at a time, from all logits in float64."""
    model = copy.deepcopy(policy.base).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        (response,) = example.responses
        ids = torch.tensor([example.prompt_ids + response])
        logps = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        best, token = logps.max(dim=-1)
        tau = best.sort().values[(len(response) - 1) // 2].detach()
        for t, label in enumerate(response):
            total = total - (1 - share) * logps[t, label]
            if best[t] >= tau:
                total = total - share * logps[t, token[t]]
            count += 1
    (total / count).backward()
    policy.zero_grad()
    return torch.stack(
        [(total / count).detach(), model.lm_head.weight.grad.norm(), model.model.norm.weight.grad.norm()]
    )


def ours(policy: PolicyModule, examples: list[PrefixGroup], progress: float, max_tokens: int) -> torch.Tensor:
    policy.zero_grad()
    objective = confident_sft(0.5, 0.2)
    objective.begin(progress)
    total, loss = sum(objective.size(each) for each in examples), torch.zeros(())
    with attention_hook(policy.base):
        for batch in pack(examples, max_tokens=max_tokens):
            part, sums = objective(policy, batch, total)
            part.backward()
            loss = loss + part.detach()
            assert sums.shape == (len(objective.metrics),)
    weight, norm = policy.base.lm_head.weight.grad, policy.base.model.norm.weight.grad
    return torch.stack([loss, weight.norm(), norm.norm()]).double()


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.25), (0.2, 0.5), (0.9, 0.5)])
def test_loss_and_gradients_are_those_of_the_definition(policy: PolicyModule, progress: float, share: float) -> None:
    examples = groups(1, 2, 5, 8)
    wanted = by_definition(policy, examples, share)
    for max_tokens in (12, 200):  # one example a row, and all in one
        torch.testing.assert_close(ours(policy, examples, progress, max_tokens), wanted, rtol=2e-5, atol=1e-6)


def test_half_of_every_response_is_confident() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 7.0, 5.0])
    cu_rows = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # the second response is empty
    assert medians(values, cu_rows).tolist() == [2.0, 2.0, 2.0, 7.0, 7.0, 7.0, 7.0]
