"""Rotary factors that look at the length of the row (LongRoPE): each sequence gets what it would get alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import model_of
from generation_checks import some_prompts
from transformers import PreTrainedModel

from macpo.engine.config import PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack, unshared
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.equivalence import expected_window
from macpo.engine.models.head import response_logps
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.rotary import switch_length
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference
from macpo.engine.training.reference import reference_logps
from macpo.integrations.packed import enable

SWITCH = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": SWITCH,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": SWITCH}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH},
    # two scalings of the rotated queries and keys besides the factors
    "phimoe": EXPERTS | {"rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.5}},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    # queries scaled by a token's own position
    "ministral3": {"num_key_value_heads": 2, "head_dim": 8, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
}


def groups_of(*sizes: tuple[int, list[int]]) -> list[PrefixGroup]:
    found = []
    for seed, (prompt, responses) in enumerate(sizes):
        ids = some_prompts([prompt, *responses], seed)
        found.append(PrefixGroup(ids[0], ids[1:]))
    return found


GROUPS = groups_of(
    (6, [4, 5]),  # short
    (14, [8, 9]),  # long
    (12, [4, 5, 3, 9]),  # one on each side of the switch by one token, and two further away
    (SWITCH, [1, 2]),  # the prompt alone fills the short range
    (20, [3, 30]),
)


def make(name: str) -> PreTrainedModel:
    return model_of(name, **MODELS[name])


def alone(model: PreTrainedModel, groups: list[PrefixGroup]) -> list[float]:
    """Log-probs of all response tokens, each sequence by a plain forward of its own."""
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            logps = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_do_not_depend_on_what_else_is_in_the_row(name: str) -> None:
    model = make(name)
    got = [logp for group in score(model, GROUPS, max_tokens=1000) for each in group for logp in each.token_logps]
    torch.testing.assert_close(torch.tensor(got), alone(model, GROUPS), rtol=1e-5, atol=2e-5)


def test_the_first_dpo_loss_is_ln_2_in_other_rows_than_the_references() -> None:
    policy = PolicyModule(make("phi3"))
    pairs = [PrefixGroup(group.prompt_ids, group.responses[-2:]) for group in GROUPS]
    ref = reference_logps(score(policy, pairs, max_tokens=1))
    (batch,) = pack(pairs, max_tokens=1000)
    loss, _ = preference(PreferenceSettings(sft_weight=0.0), ref)(policy, batch, len(pairs))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("path", ["policy", "drop-in"])
def test_gradients_are_those_of_separate_forwards(path: str) -> None:
    """A prompt between both sides is computed twice, and the gradients of both add up."""
    model = make("phi3")
    want = torch.autograd.grad((alone(model, GROUPS) ** 2).sum(), list(model.parameters()))  # type: ignore[operator]
    (batch,) = pack(GROUPS, max_tokens=1000, order="given")
    if path == "policy":
        logps = PolicyModule(model).token_logps(batch)
    else:
        logps = enable(model)(packed=batch, reduce=response_logps)
    got = torch.autograd.grad((logps**2).sum(), list(model.parameters()))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item() + 1e-6)


def test_only_a_prompt_on_both_sides_of_the_switch_is_copied() -> None:
    (batch,) = pack(GROUPS, max_tokens=1000, order="given")
    assert unshared(batch, None) is batch
    assert unshared(batch, 1000) is batch
    split = unshared(batch, SWITCH)
    assert split.num_tokens == batch.num_tokens + len(GROUPS[2].prompt_ids)
    assert torch.equal(split.target, batch.target) and torch.equal(split.cu_rows, batch.cu_rows)
    assert (split.groups, split.max_length) == (batch.groups, batch.max_length)


# --- generation ---

PROMPTS = some_prompts([10, SWITCH - 1, SWITCH, SWITCH + 1, 24, 3])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["slots", "pool"])
def test_greedy_text_is_the_models_own_whatever_the_batch(cache: Any) -> None:
    """transformers' generate, too, computes the cache of Phi-3 again where the factors change."""
    model = make("phi3")
    params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    got = Generator(model, cache=cache, block_tokens=4, max_batch=4).generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, got, strict=True):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        want = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert output.samples[0].token_ids == want
        assert output.samples[0].finish_reason == "length"


@torch.no_grad()
@pytest.mark.parametrize(("name", "cache"), [("phi3", "slots"), ("phi3", "pool"), ("phimoe", "slots")])
def test_samples_are_those_of_a_sequence_alone(name: str, cache: Any) -> None:
    """Log-probs of each token are those of the model's forward over the sequence so far."""
    model = make(name)
    params = SamplingParams(temperature=1.0, max_new_tokens=8, n=2, seed=3, repetition_penalty=1.1)
    generator = Generator(model, cache=cache, block_tokens=4)
    together = generator.generate(PROMPTS[:4], params, request_ids=list("abcd"))
    for prompt, id_, output in zip(PROMPTS, "abcd", together, strict=False):
        (single,) = generator.generate([prompt], params, request_ids=[id_])
        for one, other in zip(output.samples, single.samples, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            assert one.raw_logps == pytest.approx(other.raw_logps, abs=2e-5)
        for i, (token, logp) in enumerate(zip(one.token_ids, one.raw_logps, strict=True)):
            so_far = torch.tensor([prompt + one.token_ids[:i]])
            row = model(input_ids=so_far, use_cache=False).logits[0, -1].log_softmax(-1)
            assert row[token].item() == pytest.approx(logp, abs=2e-5)


def test_an_end_at_the_switch_is_an_end() -> None:
    """A stop token or the budget that comes with the last token before the switch: nothing is drawn after it."""
    model, prompt = make("phi3"), PROMPTS[0]
    params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    tokens = Generator(model).generate([prompt], params)[0].samples[0].token_ids
    room = SWITCH - len(prompt) + 1
    for count in (room - 1, room, room + 1):
        short = SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
        assert Generator(model).generate([prompt], short)[0].samples[0].token_ids == tokens[:count]
        stop = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True, stop_token_ids=(tokens[count],))
        (sample,) = Generator(model).generate([prompt], stop)[0].samples
        first = tokens.index(tokens[count])
        assert (sample.token_ids, sample.finish_reason) == (tokens[:first], "stop")


# --- refused by name ---


def test_layers_that_switch_at_different_lengths_are_refused() -> None:
    model = make("phi3")
    sides = {"sliding_attention": LONGROPE, "full_attention": LONGROPE | {"original_max_position_embeddings": 8}}
    model.config.rope_parameters = sides
    with pytest.raises(ConfigError, match=r"switches its rotary factors at \[8, 16\] tokens, by layer"):
        switch_length(model)


def test_a_drop_in_refuses_sequences_where_dynamic_factors_depend_on_the_row() -> None:
    model = enable(make("llama"))
    (batch,) = pack(groups_of((4, [3]), (40, [25])), max_tokens=1000)
    with pytest.raises(DataError, match="a sequence has 65 tokens, and beyond 64 dynamic rotary factors depend"):
        model(packed=batch, reduce=response_logps)


def test_queries_scaled_by_their_place_in_the_row_are_refused() -> None:
    sizes: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    model = model_of("llama4_text", layer_types=["full_attention"] * 2, attn_temperature_tuning=True, **sizes)
    with pytest.raises(ConfigError, match="place in the row instead of their position"):
        expected_window(model)
