"""Every kind and option of adapter that peft writes: used exactly, or refused with a remedy that is tried here.

A pooled base keeps its bits whatever is opened on it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, model_of, separate_logps, some_groups
from peft import AdaptionPromptConfig, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.data.pack import pack
from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.flops import meta_model
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import save_policy
from macpo.engine.models.tuning import lora
from macpo.engine.models.tuning.adapter_rules import MERGE
from macpo.engine.scoring import score
from macpo.engine.training.objectives import sft

PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
EXACT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0\.self_attn\.q_proj"},
    "regex": {"target_modules": r".*\.self_attn\.[qv]_proj"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"use_dora": True},
    "bias of its own": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "drawn": {"init_lora_weights": False},
}
ALIKE = ("excluded", "regex", "dropout", "gaussian", "orthogonal", "eva", "drawn")
"""Those that differ from `plain` in how they were made alone: training goes on from them as from it."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias all": ({"bias": "all"}, r"trains biases of the base \(bias: all\)"),
    "bias lora_only": ({"bias": "lora_only"}, r"trains biases of the base \(bias: lora_only\)"),
    "pissa": ({"init_lora_weights": "pissa"}, "initialisation pissa"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_2"}, "initialisation pissa_niter_2"),
    "olora": ({"init_lora_weights": "olora"}, "initialisation olora"),
    "mica": ({"init_lora_weights": "mica"}, "initialisation mica"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens, an embedding"),
    "whole head": ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
    "whole embedding": ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save: \['embed_tokens'\]"),
    "whole norm": ({"modules_to_save": ["norm"]}, r"modules_to_save: \['norm'\]"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    "dora head": ({"target_modules": ["lm_head"], "use_dora": True}, "the output layer lm_head, and is not plain LoRA"),
    "resized": ({"resized": VOCAB + 3}, rf"shape \[{VOCAB + 3}, 32\], the base has \[{VOCAB}, 32\]: its vocabulary"),
    "invoked": ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens"),
}
AT_THE_ENDS = ("embedding", "whole head", "whole embedding", "tokens", "dora head", "resized")
# what each kind besides LoRA needs to be made for a tiny model; None: only its config is written
MADE: dict[str, dict[str, Any] | None] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 1, 1]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4], "target_modules": None},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
    **dict.fromkeys(("ADAMSS", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "XLORA")),
}


@pytest.fixture(autouse=True)
def no_advice() -> Iterator[None]:
    """peft warns of what these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model with biases, without (False) and with tied embeddings."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp("base")
        model_of("qwen2", num_key_value_heads=2, tie_word_embeddings=tied).save_pretrained(folders[tied])
    return folders


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, which is enough to make every kind of adapter."""
    folder = tmp_path_factory.mktemp("small")
    model_of("qwen2", num_key_value_heads=2, num_hidden_layers=1).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(input_ids=torch.arange(3, 11)[None]).logits
    return out


def perturb(model: nn.Module) -> None:
    """Change every trained weight, by its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.05 * noise.to(parameter.dtype))


@functools.cache
def loaded(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    return model


def opened(base: Path, rows: int | None = None) -> PreTrainedModel:
    model = copy.deepcopy(loaded(base))
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model


def written(base: Path, config: PeftConfig, out: Path, rows: int | None = None) -> Tensor:
    """An adapter as peft writes it, trained a little, and its logits."""
    model = get_peft_model(opened(base, rows), config).eval()
    perturb(model)
    model.save_pretrained(out)
    return logits(model)


class Pool:
    """A cache with a base in it, which must keep its bits."""

    @classmethod
    @functools.cache
    def of(cls, base: Path) -> Pool:
        """One pool for all tests."""
        return cls(base)

    def __init__(self, base: Path) -> None:
        self.cache, self.base = ModelCache(), str(base)
        self.plain = self.cache.policy(PolicyRef(self.base))
        self.tensors = self.plain.base.state_dict()  # the pooled ones
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def policy(self, adapter: Path, tuning: Any = None) -> PolicyModule:
        return self.cache.policy(PolicyRef(self.base, str(adapter)), tuning)

    def assert_unchanged(self) -> None:
        again = self.cache.policy(PolicyRef(self.base))
        for name, tensor in again.base.state_dict().items():
            assert tensor.data_ptr() == self.tensors[name].data_ptr() and tensor.equal(self.before[name]), name
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert torch.equal(logits(again.model), logits(self.plain.model))


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in EXACT), ("plain", True), ("head", True)])
def test_what_is_used_is_used_exactly(bases: dict[bool, Path], tmp_path: Path, name: str, tied: bool) -> None:
    """Logits as peft's, packed as separate; training goes on from it, is saved and read by peft; merged it is equal."""
    base, options = bases[tied], PLAIN | EXACT[name]
    want = written(base, LoraConfig(**options), tmp_path / "a")
    pool = Pool.of(base)
    policy = pool.policy(tmp_path / "a")
    torch.testing.assert_close(logits(policy.model), want, rtol=1e-5, atol=1e-5)
    groups = some_groups(num_responses=1, count=2)
    got = [t for group in score(policy, groups) for s in group for t in s.token_logps]
    theirs = PeftModel.from_pretrained(opened(base), str(tmp_path / "a")).eval()
    with torch.no_grad():
        assert got == pytest.approx(torch.cat(separate_logps(theirs, groups)).tolist(), rel=1e-5, abs=1e-5)

    pool.assert_unchanged()
    if name in ALIKE:
        return
    targets = ("q_proj", "lm_head") if name == "head" else ("q_proj", "v_proj")
    lora.check_adapter(meta_model(theirs.config), tmp_path / "a", LoraSettings(rank=2, alpha=4, target_modules=targets))
    training = pool.policy(tmp_path / "a", LoraSettings(rank=2, alpha=4, target_modules=targets))
    (batch,) = pack(groups, max_tokens=1000)
    loss, _ = sft()(training, batch, 1)
    loss.backward()
    with torch.no_grad():
        for parameter in training.trainable_parameters().values():
            parameter.sub_(1e-3 * parameter.grad)
    assert not torch.equal(logits(training.model), logits(policy.model))
    save_policy(training, tmp_path / "b", base_name=str(base))
    again = PeftModel.from_pretrained(opened(base), str(tmp_path / "b")).eval()
    torch.testing.assert_close(logits(again), logits(training.model), rtol=1e-5, atol=1e-5)

    if name == "bias of its own":
        base_model = opened(base)  # q and v have biases here, so that it can be merged
        assert base_model.model.layers[0].self_attn.q_proj.bias is not None
    merged = pool.policy(tmp_path / "a", FullSettings())
    torch.testing.assert_close(logits(merged.model), want, rtol=1e-4, atol=2e-5)
    save_policy(merged, tmp_path / "m", base_name="x")
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "m")), want, rtol=1e-4, atol=2e-5)
    pool.assert_unchanged()


def remedied(fix: str, base: Path, adapter: Path, out: Path, rows: int | None) -> Tensor:
    """The logits of the whole model that the remedy makes, word by word."""
    assert MERGE in fix
    model: Any = opened(base)
    assert ("base.resize_token_embeddings" in fix) == (rows is not None)
    if rows is not None:
        model.resize_token_embeddings(rows)
    if "base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())" in fix:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    return logits(ModelCache().policy(PolicyRef(str(out))).model)


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in REFUSED), *((name, True) for name in AT_THE_ENDS)]
)
def test_what_is_not_exact_is_refused_with_a_remedy(
    bases: dict[bool, Path], tmp_path: Path, name: str, tied: bool
) -> None:
    base, (changes, said) = bases[tied], REFUSED[name]
    changes = dict(changes)
    rows = changes.pop("resized", None)
    want = written(base, LoraConfig(**(PLAIN | changes)), tmp_path / "a", rows)
    pool = Pool.of(base)
    for tuning in (None, LoraSettings(rank=2, alpha=4), FullSettings()):
        with pytest.raises(ConfigError, match=said) as caught:
            pool.policy(tmp_path / "a", tuning)
    with pytest.raises(ConfigError, match=said):
        lora.check_adapter(meta_model(pool.plain.base.config), tmp_path / "a")
    pool.assert_unchanged()
    (problem,) = caught.value.problems
    if name == "invoked":
        assert "plain LoRA" in problem.fix
    elif name == "pissa_niter":
        assert "path_initial_model_for_weight_conversion" in problem.fix
    else:
        got = remedied(problem.fix, base, tmp_path / "a", tmp_path / "m", rows)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_a_pissa_adapter_that_peft_converts_is_exact(bases: dict[bool, Path], tmp_path: Path) -> None:
    """The remedy where peft cannot repeat the initialisation."""
    model = get_peft_model(opened(bases[False]), LoraConfig(**PLAIN, init_lora_weights="pissa_niter_2"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa_niter_2"
    perturb(model)
    want = logits(model.eval())
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    got = logits(Pool.of(bases[False]).policy(tmp_path / "a").model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", sorted(kind.name for kind in KINDS if kind.name != "LORA"))
def test_other_kinds_are_refused_with_a_remedy(small: Path, tmp_path: Path, kind: str) -> None:
    cls = next(config for each, config in KINDS.items() if each.name == kind)
    options = MADE.get(kind, {})
    fields = {field.name for field in dataclasses.fields(cls)}
    targets = {"target_modules": ["q_proj", "v_proj"]} if "target_modules" in fields else {}
    want = None
    if options is None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    else:
        want = written(small, cls(**({"task_type": "CAUSAL_LM"} | targets | options)), tmp_path / "a")
    pool = Pool.of(small)
    with pytest.raises(ConfigError, match=f"a {kind} adapter: only LoRA is supported") as caught:
        pool.policy(tmp_path / "a")
    pool.assert_unchanged()
    (problem,) = caught.value.problems
    if want is not None and MERGE in problem.fix:
        got = remedied(problem.fix, small, tmp_path / "a", tmp_path / "m", None)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    elif want is not None:
        model = PeftModel.from_pretrained(opened(small), str(tmp_path / "a"))
        with pytest.raises((AttributeError, NotImplementedError)):
            model.merge_and_unload()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"made_up_next_year": 3}, "an option that is not supported .made_up_next_year."),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"task_type": "SEQ_CLS"}, "trained for SEQ_CLS"),
        ({"init_lora_weights": "corda"}, "initialisation corda"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"r": "many"}, "is not understood"),
    ],
)
def test_a_config_that_says_more_than_is_known_is_refused(
    bases: dict[bool, Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    written(bases[False], LoraConfig(**PLAIN), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        Pool.of(bases[False]).policy(tmp_path / "a")


def test_a_changed_copy_of_a_base_weight_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    written(bases[False], LoraConfig(**PLAIN | EXACT["head"]), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"changed copy of the base's lm_head\.weight"):
        Pool.of(bases[False]).policy(tmp_path / "a")


def test_a_bias_that_the_base_has_no_place_for_is_not_merged(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    written(tmp_path / "base", LoraConfig(**PLAIN, lora_bias=True), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"cannot be merged into model.layers.0.self_attn.q_proj"):
        Pool.of(tmp_path / "base").policy(tmp_path / "a", FullSettings())


def test_own_targets_and_what_training_goes_on_from(bases: dict[bool, Path], tmp_path: Path) -> None:
    pool = Pool.of(bases[True])
    for targets in (("embed_tokens",), ("q_proj", "embed_tokens")):
        with pytest.raises(ConfigError, match=r"target_modules: .*leave embed_tokens out of target_modules"):
            pool.cache.policy(PolicyRef(pool.base), LoraSettings(rank=2, target_modules=targets))
    written(bases[True], LoraConfig(**PLAIN), tmp_path / "a")
    with pytest.raises(ConfigError, match="the adapter sits on q_proj, v_proj, the settings say all-linear"):
        pool.policy(tmp_path / "a", LoraSettings(rank=2, alpha=4, target_modules="all-linear"))
    written(bases[True], LoraConfig(**PLAIN | {"target_modules": "all-linear"}), tmp_path / "all")
    pool.policy(tmp_path / "all", LoraSettings(rank=2, alpha=4, target_modules="all-linear"))
    pool.assert_unchanged()


def test_an_adapter_is_no_whole_model(bases: dict[bool, Path], tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, whatever weights lie beside it."""
    opened(bases[False]).save_pretrained(tmp_path / "a")
    written(bases[False], LoraConfig(**PLAIN), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"an adapter .* where a whole model is needed"):
        load_causal_lm(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING: its virtual tokens"),
        (LoraConfig(**PLAIN, alora_invocation_tokens=[4]), "an activated LoRA"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"), "its own forward"),
    ],
)
def test_what_peft_adds_outside_the_layers_is_refused(config: PeftConfig, said: str) -> None:
    """Scoring and decoding go through the base, which knows nothing of it."""
    model = get_peft_model(model_of("llama", num_hidden_layers=1), config)
    for use in (PolicyModule, Generator):
        with pytest.raises(ConfigError, match=said):
            use(model)
