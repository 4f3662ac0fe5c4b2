"""Generation refuses bad requests, bad settings and models that it cannot honour, by name and before any work."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import VOCAB, model_of
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError, DataError, MacpoError
from macpo.engine.generation import Generator, SamplingParams


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


def test_bad_requests_are_refused_before_any_work(llama: PreTrainedModel) -> None:
    ok, generator = [5, 6, 7], Generator(llama, max_cache_tokens=64)
    calls = llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    params = SamplingParams(max_new_tokens=4)
    cases: list[tuple[type[MacpoError], str, list[list[int]], Any, dict[str, Any]]] = [
        (DataError, "prompt is empty", [ok, []], params, {}),
        (DataError, "the prompt has 64 tokens, the model's context 64", [[5] * 64], params, {}),
        (DataError, "may take 64 tokens, the cache 32", [[5] * 40], params, {"max_cache_tokens": 32}),
        (DataError, f"outside the model's [0, {VOCAB})", [[VOCAB]], params, {}),
        (DataError, "two requests have this id", [ok, ok], params, {"request_ids": ["a", "a"]}),
        (ConfigError, "2 request ids for 1 prompts", [ok], params, {"request_ids": ["a", "b"]}),
        (ConfigError, "2 sampling params for 1 prompts", [ok], [params, params], {}),
        (ConfigError, "unknown adapter 'x'", [ok], params, {"adapters": "x"}),
        (ConfigError, "stop texts need a tokenizer", [ok], SamplingParams(stop=("x",)), {}),
    ]
    for kind, message, prompts, given_params, options in cases:
        maker = Generator(llama, max_cache_tokens=options.pop("max_cache_tokens", None))
        with pytest.raises(kind) as caught:
            maker.generate(prompts, given_params, **options)
        assert message in str(caught.value) and "\n" not in str(caught.value) and "Fix: " in str(caught.value)
    calls.remove()
    assert generator.generate([], params) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1),
     ("min_p", 2.0), ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("n", 0), ("n", True), ("seed", -1),
     ("stop", ("",)), ("stop_token_ids", (-1,))],
)  # fmt: skip
def test_params_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{field}") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [  # recurrent layers; biases in the mask, and attention with a softcap that its forward does not pass on
        ("mamba", {"state_size": 4}, "MambaForCausalLM has layers of type linear_attention"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM adds ALiBi's biases to its attention"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "Gemma3ForCausalLM: Gemma3Attention has a softcap that its"),
    ],
)
def test_models_that_the_attention_hook_cannot_honour_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    """Every time, with the architecture and what to use instead; the model's mode and attention are restored."""
    model = model_of(name, **changes).train()
    generator, attention = Generator(model), model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(ConfigError, match=message) as caught:
            generator.generate([[5, 6]], SamplingParams(max_new_tokens=2))
        assert "Fix: use a decoder-only model with standard attention" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert model.training and model.config._attn_implementation == attention


def test_a_layer_beside_the_attention_interface_is_refused() -> None:
    """One of two layers attends by itself, so its keys and values would never be cached."""
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: 1 of its 2 layers use transformers' attention interface"):
        Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=2))


def test_decoding_that_differs_from_the_model_is_refused() -> None:
    """A state of the whole row, here a running sum, is lost when a token is decoded by itself."""
    model = model_of("llama")
    model.model.register_forward_hook(
        lambda *hook: setattr(hook[-1], "last_hidden_state", hook[-1].last_hidden_state.cumsum(1))
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM: cached and separate forwards differ by"):
        Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=2))
