"""A model folder that loads is never refused by its headers, whatever its family and however it was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, model_of
from safetensors.torch import load_file, save_file

from macpo.engine.errors import ConfigError, ResourceError
from macpo.engine.planning.headers import inspect

OTHERS: dict[str, dict[str, Any]] = {  # fused weights, experts, learned positions, tied heads
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4},
    "gpt2": {"n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_what_transformers_saves_fits_its_config(name: str, tmp_path: Path) -> None:
    model = model_of(name, **OTHERS.get(name, {}))
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    found = inspect(tmp_path)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.model is not None and all(parameter.is_meta for parameter in found.model.parameters())
    assert found.positions == getattr(model.config, "max_position_embeddings", None)


def test_weights_of_the_body_alone_and_more_than_is_asked_for(tmp_path: Path) -> None:
    """Names without the prefix; buffers of older versions."""
    model = model_of("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = next(iter(tensors.values())).flatten()[:4].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert inspect(tmp_path).num_parameters == sum(p.numel() for p in model.parameters()) + 4


def test_absurd_sizes_are_refused_without_building_anything(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, kind, said in (
        ({"num_hidden_layers": 10**6}, ResourceError, "num_hidden_layers is 1,000,000"),
        ({"num_hidden_layers": 5000}, ConfigError, "the config has 5,000 layers"),
        ({"vocab_size": 10**9}, ResourceError, "the config's model has .* parameters"),
        ({"vocab_size": 10**4}, ConfigError, "by the config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(kind, match=said):
            inspect(tmp_path)
