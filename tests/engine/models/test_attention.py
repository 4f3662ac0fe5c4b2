"""The attention hook on real architectures: packed = separate, restored afterwards, loud about what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, SIZES, model_of, separate_logps, some_groups
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import HOOK_NAME, PackedAttention, attention_hook, is_active
from macpo.engine.models.policy import PolicyModule
from macpo.kernels import AttentionForm


def packed_logps(model: Any, base: PreTrainedModel, groups: list[PrefixGroup]) -> Tensor:
    """Through the whole Hugging Face model (or peft's wrapper), so that the keyword passes every layer on the way."""
    (batch,) = pack(groups, max_tokens=10_000, order="given")
    with attention_hook(base):
        out = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            attention_context=PackedAttention(batch.segments),
        )
    rows = out.logits[0, batch.rows].float().log_softmax(-1)
    return rows.gather(1, batch.target[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate(name: str, wrapped: bool) -> None:
    base = model_of(name)
    before = base.config._attn_implementation
    model: Any = base
    if wrapped:
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    groups = some_groups(num_responses=3)
    got, want = packed_logps(model, base, groups), torch.cat(separate_logps(model, groups))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.5, "the model is too close to uniform to show an error"
    assert base.config._attn_implementation == before != HOOK_NAME


class Recorder:
    """A context of somebody else's, as generation has one: it sees every layer once, with per-layer metadata."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None, float]] = []

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        self.calls.append((module.layer_idx, form.window, form.scale))
        assert q.shape[0] == k.shape[0] == 2
        return q.transpose(1, 2)


@torch.no_grad()
def test_any_context_is_called_once_a_layer_with_scale_and_window() -> None:
    model = model_of("gemma3_text")
    recorder = Recorder()
    with attention_hook(model):
        model.base_model(input_ids=torch.ones(2, 3, dtype=torch.long), use_cache=False, attention_context=recorder)
    scale = model.config.query_pre_attn_scalar**-0.5
    assert recorder.calls == [(0, 5, scale), (1, None, scale)]


def test_the_hook_is_restored_after_an_error_and_nests() -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), attention_hook(model):
        with attention_hook(model):
            assert is_active(model)
        assert is_active(model), "the inner block must not switch the outer one off"
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_a_forward_without_context_is_refused() -> None:
    model = model_of("llama")
    with attention_hook(model), pytest.raises(ConfigError, match="did not get the keywords"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_dropout_in_training_is_refused() -> None:
    model = model_of("llama", attention_dropout=0.1).train()
    (batch,) = pack([PrefixGroup([3, 4], [[5]])], max_tokens=8)
    with attention_hook(model), pytest.raises(ConfigError, match=r"drops attention weights.*attention_dropout"):
        model(input_ids=batch.input_ids, attention_context=PackedAttention(batch.segments))


MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA4 = SIZES | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "Gemma3Attention has a softcap that its forward does not"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "Gemma2ForCausalLM: softcap must be above 0, got 0.0"),
        ("mamba", MAMBA, "MambaForCausalLM has layers of type linear_attention"),
        ("bloom", BLOOM, "BloomForCausalLM adds ALiBi's biases"),
        ("llama4_text", LLAMA4, "chunked_attention"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyModule(model_of(name, **changes))


def test_a_head_with_an_unknown_factor_is_refused() -> None:
    """The config names a logit scale that this architecture does not apply: the probe sees the difference."""
    model = model_of("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="packed and separate forwards differ"):
        PolicyModule(model)


def test_state_that_leaks_between_responses_is_refused() -> None:
    """A backbone with a running mean over the row's tokens works alone but mixes packed responses."""
    model = model_of("llama")

    def running_mean(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = out.last_hidden_state
        count = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        out.last_hidden_state = hidden + 0.1 * hidden.cumsum(1) / count
        return out

    model.base_model.register_forward_hook(running_mean)
    with pytest.raises(ConfigError, match="packed and separate forwards differ"):
        PolicyModule(model)
