"""What a configuration alone is enough to refuse, by name and before a weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import SIZES, model_of
from transformers import AutoConfig

from macpo.engine.config import ComputeSettings
from macpo.engine.errors import ConfigError
from macpo.engine.models import compute
from macpo.engine.models.loading import load_causal_lm, read_config
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.support import refuse_unsupported


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {}, "t5 is an encoder-decoder"),
        ("bart", {}, "BartForCausalLM is an encoder-decoder"),
        ("bert", {}, r"BertLMHeadModel attends in both directions \(is_decoder is false\)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "Gemma3ForCausalLM attends in both directions"),
        ("llama4_text", {}, "Llama4ForCausalLM has layers of type chunked_attention"),
        ("mamba", {}, "MambaForCausalLM has layers of type linear_attention"),
        ("rwkv", {}, "RwkvForCausalLM is recurrent"),
        ("bloom", {}, "BloomForCausalLM adds ALiBi's biases"),
        ("falcon", {"alibi": True}, "FalconForCausalLM adds ALiBi's biases"),
        ("mpt", {}, "MptForCausalLM adds ALiBi's biases"),
        ("falcon", {"alibi": False}, "FalconForCausalLM does not use transformers' attention interface"),
        ("vit", {}, "vit is no causal language model"),
    ],
)
def test_a_folder_is_refused_before_its_weights_are_looked_for(
    name: str, changes: dict[str, bool], message: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(name, **changes).save_pretrained(tmp_path)
    for refuse in (lambda: refuse_unsupported(read_config(tmp_path)), lambda: load_causal_lm(tmp_path)):
        with pytest.raises(ConfigError, match=rf"{message}.* Fix: use a decoder-only model"):
            refuse()


def test_a_config_that_is_none_is_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with pytest.raises(ConfigError, match="the config is not one of a model that can be built"):
        read_config(tmp_path)


def test_a_model_with_its_own_code_is_refused_for_what_its_configuration_says() -> None:
    config = AutoConfig.for_model("vit", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    refuse_unsupported(config)  # the probe judges it at its first use
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ConfigError, match="layers of type chunked_attention"):
        refuse_unsupported(config)


def test_a_window_as_long_as_the_context_need_not_reach_the_attention() -> None:
    """Phi-3.5-MoE has one of 131072, its whole context, and transformers does not pass it on."""
    sizes = SIZES | {"num_local_experts": 2, "num_key_value_heads": 2}
    PolicyModule(model_of("phimoe", **(sizes | {"sliding_window": 64})))
    with pytest.raises(ConfigError, match="sliding window of 6 but does not pass it"):
        PolicyModule(model_of("phimoe", **(sizes | {"sliding_window": 6})))


def test_waves_are_larger_on_a_gpu_and_batches_are_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, own = ComputeSettings(), ComputeSettings(generation_batch=8, wave_requests=3)
    assert (auto.generation_batch, auto.wave_requests) == ("auto", "auto")
    for device, batch, wave in (("cpu", 256, 256), ("cuda", 256, 2048)):
        monkeypatch.setattr(compute, "device_of", lambda _, device=device: torch.device(device))
        assert (compute.generation_batch(auto), compute.wave_requests(auto)) == (batch, wave)
        assert (compute.generation_batch(own), compute.wave_requests(own)) == (8, 3)


def test_a_cpus_batch_leaves_room_for_other_programs() -> None:
    auto, own = (ComputeSettings(device="cpu", generation_batch=batch) for batch in ("auto", 8))
    config = model_of("llama", **SIZES).config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    fitting = compute.CPU_CACHE_BYTES // token
    assert compute.generation_batch(auto, config, 100) == 256
    assert compute.generation_batch(auto, config, fitting // 100) == 100
    assert compute.generation_batch(auto, config, fitting) == 64
    assert compute.generation_batch(own, config, fitting) == 8
