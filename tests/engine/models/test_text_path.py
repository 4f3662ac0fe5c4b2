"""Image-text models that AutoModelForCausalLM gives as a whole: only what text goes through is trained and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, SIZES, model_of, separate_logps, some_groups
from forks import ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from macpo.engine.config import FullSettings, LoraSettings, OptimSettings, ParallelSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.flops import ModelShape, meta_model
from macpo.engine.models.head import head_of
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import save_policy
from macpo.engine.models.tuning.text_path import outside_text
from macpo.engine.scoring import score
from macpo.engine.training.objectives import sft
from macpo.engine.training.optim import Optimizer

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": SIZES | ARCHITECTURES["gemma3_text"], "vision_config": VISION, "mm_tokens_per_image": 4},
    "fuyu": SIZES | {"text_config": SIZES | {"model_type": "llama"}, "patch_size": 2},
}


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model_of(request.param, **WRAPPERS[request.param]).save_pretrained(folder)
    return folder


def learn(policy: PolicyModule) -> None:
    """One step with weight decay."""
    groups = some_groups(num_responses=1, count=3)
    optimizer = Optimizer(policy.trainable_parameters(), OptimSettings(learning_rate=0.01, weight_decay=0.5))
    (batch,) = pack(groups, max_tokens=1000)
    loss, _ = sft()(policy, batch, sum(group.num_response_tokens for group in groups))
    loss.backward()
    optimizer.reduce(World.current(), torch.zeros(1))
    optimizer.update(0.01, 1.0)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "k_proj")])
def test_an_adapter_sits_where_text_goes_through(wrapper: Path, tmp_path: Path, targets: Any) -> None:
    policy = ModelCache().policy(PolicyRef(str(wrapper)), LoraSettings(rank=2, target_modules=targets))
    learn(policy)
    names = list(policy.trainable_parameters())
    assert names and not [name for name in names if "language_model" not in name]
    assert all(
        parameter.grad is None and parameter.abs().sum() > 0 for parameter in policy.trainable_parameters().values()
    )
    shape = ModelShape.of(policy.base.config)
    assert sum(p.numel() for p in policy.trainable_parameters().values()) == shape.adapter_parameters(2, targets)
    save_policy(policy, tmp_path, base_name="x")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wrapper), str(tmp_path)).eval()
    groups = some_groups(num_responses=1, count=2)
    got = [t for group in score(policy, groups) for s in group for t in s.token_logps]
    with torch.no_grad():
        assert got == pytest.approx(torch.cat(separate_logps(theirs, groups)).tolist(), rel=1e-4, abs=1e-4)


def test_full_training_leaves_the_rest_as_it_was(wrapper: Path, tmp_path: Path) -> None:
    policy = ModelCache().policy(PolicyRef(str(wrapper)), FullSettings())
    outside = tuple(f"{name}." for name in outside_text(policy.base))
    assert outside
    learn(policy)
    save_policy(policy, tmp_path, base_name="x")
    before, after = (load_file(folder / "model.safetensors") for folder in (wrapper, tmp_path))
    assert before.keys() == after.keys()
    is_text = {name: "language_model" in name or name.startswith("lm_head") for name in before}
    assert set(is_text.values()) == {False, True}
    for name, tensor in before.items():
        assert tensor.equal(after[name]) != is_text[name], name
    num_text = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
    assert ModelShape.of(policy.base.config).num_parameters == num_text


def test_full_training_in_16_bits_keeps_float32_weights(wrapper: Path) -> None:
    """Weights that do not train beside weights that do make no adapter of it."""

    def body(world: World) -> None:
        policy = ModelCache(dtype="bfloat16").policy(PolicyRef(str(wrapper)), FullSettings())
        policy = parallelize(policy, ParallelSettings(), world)
        (batch,) = pack(some_groups(num_responses=1, count=1), max_tokens=100)
        assert policy(batch, lambda rows, head, batch: rows).dtype == torch.bfloat16
        assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}

    assert ranks(1, body) == [0]  # a process of its own: it makes a mesh


def test_encoders_inside_a_model_without_a_config_for_text_alone() -> None:
    """Phi-4-multimodal keeps its encoders and their projections beside the token embedding."""
    model = meta_model(AutoConfig.for_model("phi4_multimodal", num_hidden_layers=1))
    outside = model.get_submodule("model.embed_tokens_extend")
    assert outside_text(model) == ["model.embed_tokens_extend"]
    num_outside, num_all = (sum(p.numel() for p in part.parameters()) for part in (outside, model))
    assert ModelShape.of(model.config).num_parameters == num_all - num_outside


def test_a_class_that_does_not_name_its_inner_model_is_refused() -> None:
    model = meta_model(AutoConfig.for_model("mllama", text_config=SIZES | {"cross_attention_layers": [1]}))
    with pytest.raises(ConfigError, match="MllamaForCausalLM does not name the model below its output layer"):
        head_of(model)


def test_a_plain_model_is_text_throughout() -> None:
    for name in ("llama", "gemma3_text", "gpt_neox"):
        assert outside_text(model_of(name)) == []


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3"])
def test_an_image_text_model_without_a_causal_lm_is_refused(tmp_path: Path, name: str) -> None:
    vision = {"mistral3": "pixtral"}.get(name)
    text = SIZES | {"num_key_value_heads": 2} | ({"model_type": "mistral"} if vision else {})
    inner = (
        VISION | {"model_type": vision} if vision else {"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2}
    )
    config = AutoConfig.for_model(name, text_config=text, vision_config=inner)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=f"{name} is no causal language model in transformers. Fix: use the text-only"
    ):
        load_causal_lm(tmp_path)
