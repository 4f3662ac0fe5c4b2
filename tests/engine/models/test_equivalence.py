"""The check before first use: a 16-bit model is judged by its own rounding, and faults show all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, model_of
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.config import LoraSettings
from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import attention_hook, equivalence
from macpo.engine.models.equivalence import TOLERANCE, probes_of, separate_logits
from macpo.engine.models.float32 import in_float32, is_plain
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning.lora import new_adapter

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixteen_bit_models_are_accepted(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(dtype)
    PolicyModule(model)
    Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=1))


def test_a_softcap_that_sdpa_would_drop_is_kept_in_the_comparison() -> None:
    """transformers 5.17 loads Gemma 2 with SDPA, whose scores have no softcap."""
    model = model_of("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    PolicyModule(model)
    Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=1))
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_model_that_rounds_much_is_judged_by_its_own_rounding() -> None:
    """At neighbouring ids, as at a real model's lowest, 8 deep layers in bfloat16 are far from float32."""
    model = sensitive(torch.float32)
    probes = probes_of(model)
    exact = torch.stack([separate_logits(model, probe) for probe in probes])
    own = torch.stack([separate_logits(model.bfloat16(), probe) for probe in probes])
    assert (own - exact).abs().max() > 2 * TOLERANCE[torch.bfloat16] * exact.abs().max()
    PolicyModule(model)
    Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=1))


def sensitive(dtype: torch.dtype) -> PreTrainedModel:
    model = model_of("llama", num_hidden_layers=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.to(dtype)


# --- faults ---


def other_positions(model: PreTrainedModel) -> None:
    """The model counts the places of the row instead of reading the positions."""

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        return args, kwargs | {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)}

    model.model.register_forward_pre_hook(count, with_kwargs=True)


def token_shift(model: PreTrainedModel) -> None:
    """A layer that mixes in a little of the token before, as RWKV's do."""
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, out: out + 0.02 * out.roll(1, -2))


def row_scale(model: PreTrainedModel) -> None:
    """A layer that divides by the largest number of its row."""
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out / out.abs().max())


def head_scale(model: PreTrainedModel) -> None:
    """A factor of the logits that the config does not name: 3%, less than bfloat16's tolerance."""
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.03
        return out

    model.forward = scaled


def window(model: PreTrainedModel) -> None:
    """A layer that tells the hook a window of 2 and itself attends without one."""
    attention = model.model.layers[1].self_attn
    attention.sliding_window = None
    attention.register_forward_pre_hook(
        lambda module, *_: setattr(module, "sliding_window", 2 if attention_hook.is_active(model) else None)
    )


def attention_scale(model: PreTrainedModel) -> None:
    """A layer whose scores the hook gets 2% too large."""
    attention = model.model.layers[1].self_attn
    own = attention.scaling
    attention.register_forward_pre_hook(
        lambda module, *_: setattr(module, "scaling", own * (1.02 if attention_hook.is_active(model) else 1.0))
    )


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("fault", [other_positions, token_shift, row_scale, window, attention_scale])
def test_faults_are_seen_in_sixteen_bits(fault: Callable[[PreTrainedModel], None], dtype: torch.dtype) -> None:
    """They are smaller than what 16 bits may round, so that they would pass if 16-bit results were compared."""
    model = model_of("qwen3" if fault is window else "llama").to(dtype)
    fault(model)
    with pytest.raises(ConfigError, match=r"packed and separate forwards differ by .*Fix: use a decoder-only model"):
        PolicyModule(model)
    with pytest.raises(ConfigError, match="cached and separate forwards differ by"):
        Generator(model).generate([[5, 6]], SamplingParams(max_new_tokens=1))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_an_unknown_factor_of_the_logits_is_seen(dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    head_scale(model)
    with pytest.raises(ConfigError, match="packed and separate forwards differ by"):
        PolicyModule(model)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("make", [model_of, sensitive])
def test_a_kernel_that_is_wrong_in_sixteen_bits_alone_is_seen(
    make: Callable[..., PreTrainedModel], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are those of the token before; in a model that rounds much, too."""
    inner = attention_hook.prefix_attention

    def wrong(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        return inner(q, k if k.dtype == torch.float32 else k.roll(1, 0), *rest, **options)

    monkeypatch.setattr(attention_hook, "prefix_attention", wrong)
    model = model_of("llama").to(dtype) if make is model_of else make(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM: in {kind} its packed logits .*compute in float32"):
        PolicyModule(model)


def test_a_cached_base_is_compared_once_in_each_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_of("llama").save_pretrained(tmp_path)
    compared: list[str] = []
    inner = equivalence.check_path
    monkeypatch.setattr(equivalence, "check_path", lambda *args: (compared.append(args[1]), inner(*args)))
    cache, lora = ModelCache(dtype="bfloat16"), LoraSettings(rank=2, target_modules="all-linear")
    for tuning in (None, lora, None, lora, LoraSettings(rank=4)):
        cache.policy(PolicyRef(str(tmp_path)), tuning)
    assert len(compared) == 3


# --- float32, a layer at a time ---


def tied_with_adapters(name: str) -> PreTrainedModel:
    model = model_of(name, tie_word_embeddings=True).bfloat16().requires_grad_(False)
    wrapped = new_adapter(model, LoraSettings(rank=2, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return wrapped.eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [model_of, tied_with_adapters])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "opt"])
def test_it_computes_what_a_float32_copy_would(name: str, make: Callable[[str], PreTrainedModel]) -> None:
    """With one layer's weights widened at a time; afterwards they are the same objects as before."""
    model = make(name).bfloat16()
    ids = torch.tensor([[5, 9, 33, 7]])
    before = {key: (parameter, parameter.dtype) for key, parameter in model.named_parameters()}
    largest = 0

    def watch(*_: Any) -> None:
        nonlocal largest
        wide = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.float32)
        largest = max(largest, wide)

    for module in model.modules():
        module.register_forward_hook(watch)
    rounded = model(input_ids=ids, use_cache=False).logits
    with in_float32(model):
        got = model(input_ids=ids, use_cache=False).logits
    after = dict(model.named_parameters())
    assert all(after[key] is parameter and after[key].dtype == dtype for key, (parameter, dtype) in before.items())
    assert 0 < largest < 0.6 * sum(parameter.numel() for parameter in model.parameters())
    want = model.float()(input_ids=ids, use_cache=False).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item())
    assert (rounded - want).abs().max() > 100 * (got - want).abs().max()


def test_an_error_in_the_middle_leaves_the_weights_as_they_were() -> None:
    model = model_of("llama").bfloat16()
    before = dict(model.named_parameters())
    model.model.layers[1].mlp.act_fn = None
    with pytest.raises(TypeError), in_float32(model):
        model(input_ids=torch.tensor([[5]]))
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_weights_in_some_code_are_not_plain() -> None:
    model = model_of("llama").bfloat16()
    assert is_plain(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_plain(model)
