"""Policies: exact gradients, adapters, the cache, what is written, and what is refused when loading."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, model_of, separate_logps, some_groups
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from macpo.engine.config import ComputeSettings, FullSettings, LoraSettings, PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.errors import ConfigError, IntegrityError, MacpoError, ResourceError
from macpo.engine.hardware import host_memory
from macpo.engine.model_folders import PolicyRef, fingerprint_model, weight_files
from macpo.engine.models.compute import memory_budget
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import save_policy
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.reference import reference_logps

LORA = LoraSettings(rank=2, target_modules="all-linear")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return folder


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Each parameter's gradient to 1e-5 of its own norm.

    A gradient that is zero in exact arithmetic (a key bias, which softmax ignores) is rounding alone; such a one is
    held to 1e-6 of the norm of all gradients.
    """
    assert got.keys() == want.keys()
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, g in want.items():
        error = (got[name] - g).norm()
        assert error <= max(1e-5 * g.norm(), 1e-6 * whole), f"{name}: {error / g.norm():.1e}"


def dpo_by_hand(chosen: list[Tensor], rejected: list[Tensor], ref: Tensor, beta: float, sft_weight: float) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7, plus the token-mean NLL of the chosen responses."""
    margins = torch.stack([c.sum() - r.sum() for c, r in zip(chosen, rejected, strict=True)]) - (ref[:, 0] - ref[:, 1])
    nll = torch.stack([-c.mean() for c in chosen])
    return -torch.nn.functional.logsigmoid(beta * margins).mean() + sft_weight * nll.mean()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_dpo_equals_separate_padded_forwards(name: str) -> None:
    model = model_of(name)
    groups = some_groups(count=6)
    settings = PreferenceSettings(beta=0.3, sft_weight=0.2)
    ref = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)) - 20.0
    logps = separate_logps(model, groups)
    wanted_loss = dpo_by_hand(logps[0::2], logps[1::2], ref, settings.beta, settings.sft_weight)
    wanted_loss.backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    policy = PolicyModule(model)
    objective = preference(settings, ref)
    loss = torch.zeros(())
    for batch in pack(groups, max_tokens=40):  # several micro-batches that must add up to the big batch
        part, _ = objective(policy, batch, len(groups))
        part.backward()
        loss += part.detach()
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert_equal_gradients({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, want)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("head", [False, True], ids=["body", "head"])
def test_packed_lora_sft_equals_separate_padded_forwards(name: str, head: bool, tmp_path: Path) -> None:
    """Also with an adapter on lm_head (untied), whose update must be part of the head that the operators see."""
    targets = ("q_proj", "v_proj", "lm_head") if head else ("q_proj", "v_proj")
    model_of(name, tie_word_embeddings=False).save_pretrained(tmp_path)
    policy = ModelCache().policy(PolicyRef(str(tmp_path)), LoraSettings(rank=2, target_modules=targets))
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():  # B = 0 would leave A without gradient
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    groups = some_groups(num_responses=1, count=6)
    logps = torch.cat(separate_logps(policy.model, groups))
    (-logps.mean()).backward()
    want = {key: p.grad.clone() for key, p in policy.trainable_parameters().items()}
    policy.zero_grad()
    (batch,) = pack(groups, max_tokens=10_000)
    loss, _ = sft()(policy, batch, sum(g.num_response_tokens for g in groups))
    loss.backward()
    assert loss.item() == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert_equal_gradients({key: p.grad for key, p in policy.trainable_parameters().items()}, want)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_first_dpo_loss_is_ln_2(name: str) -> None:
    policy = PolicyModule(model_of(name).train())  # a policy leaves train mode: no dropout between it and its reference
    groups = some_groups(count=6)
    ref = reference_logps(score(policy, groups, max_tokens=64))
    (batch,) = pack(groups, max_tokens=10_000)
    loss, _ = preference(PreferenceSettings(sft_weight=0.0), ref)(policy, batch, len(groups))
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cohere", {"logit_scale": 0.25, "num_key_value_heads": 2}),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "num_key_value_heads": 2}),
        ("phi", {}),  # a bias on the head
        ("nanochat", {"final_logit_softcapping": 2.0, "num_key_value_heads": 2}),
    ],
)
def test_heads_with_scale_bias_and_softcap(name: str, changes: dict[str, Any]) -> None:
    model = model_of(name, **changes)
    groups = some_groups()
    got = [t for group in score(model, groups) for s in group for t in s.token_logps]
    assert got == pytest.approx(torch.cat(separate_logps(model, groups)).tolist(), rel=1e-5, abs=1e-5)


# --- adapters and the cache ---


def test_a_saved_adapter_comes_back_here_and_in_peft(llama: Path, tmp_path: Path) -> None:
    cache = ModelCache()
    policy = cache.policy(PolicyRef(str(llama)), LORA, seed=5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.1)
    save_policy(policy, tmp_path / "a", base_name="some/base")
    groups = some_groups()
    want = score(policy, groups)
    assert score(cache.policy(PolicyRef(str(llama), str(tmp_path / "a"))), groups) == want
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a")
    assert score(theirs, groups) == want
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    # continuing trains a copy: the file and what others loaded from it stay as they are
    again = cache.policy(PolicyRef(str(llama), str(tmp_path / "a")), LORA)
    assert again.trainable_parameters().keys() == policy.trainable_parameters().keys()
    save_policy(again, tmp_path / "b", base_name="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_fresh_adapter_depends_on_the_seed_alone_and_changes_nothing(llama: Path) -> None:
    cache = ModelCache()
    torch.manual_seed(1)
    first = cache.policy(PolicyRef(str(llama)), LORA, seed=7)
    torch.manual_seed(2)
    second, other = (cache.policy(PolicyRef(str(llama)), LORA, seed=s) for s in (7, 8))
    for name, parameter in first.trainable_parameters().items():
        assert torch.equal(parameter, second.trainable_parameters()[name])
        if "lora_A" in name:
            assert not torch.equal(parameter, other.trainable_parameters()[name])
            assert 0.8 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1.0  # uniform to 1/sqrt(in), as peft's
        else:
            assert not parameter.any()
    assert score(first, some_groups()) == score(cache.policy(PolicyRef(str(llama))), some_groups())


def test_policies_of_one_base_do_not_touch_each_other(llama: Path) -> None:
    cache = ModelCache()
    plain = cache.policy(PolicyRef(str(llama)))
    lora, full = (cache.policy(PolicyRef(str(llama)), tuning) for tuning in (LORA, FullSettings()))
    before = score(plain, some_groups())
    for policy in (lora, full):
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.add_(0.05)
        assert score(policy, some_groups()) != before
        assert score(plain, some_groups()) == before
    assert score(cache.policy(PolicyRef(str(llama))), some_groups()) == before
    assert (cache.loads, cache.resident) == (1, (str(llama),))
    assert not plain.trainable_parameters()
    assert len(full.trainable_parameters()) == len(list(full.model.parameters()))
    shared = {p.data_ptr() for p in plain.model.parameters()}
    assert shared < {p.data_ptr() for p in lora.model.parameters()}, "an adapter's base is not copied"
    assert not shared & {p.data_ptr() for p in full.model.parameters()}, "full training works on a copy"


def test_full_tuning_of_an_adapter_starts_from_the_merged_weights(llama: Path, tmp_path: Path) -> None:
    cache = ModelCache()
    lora = cache.policy(PolicyRef(str(llama)), LORA)
    with torch.no_grad():
        for parameter in lora.trainable_parameters().values():
            parameter.add_(0.1)
    save_policy(lora, tmp_path / "adapter", base_name="x")
    full = cache.policy(PolicyRef(str(llama), str(tmp_path / "adapter")), FullSettings())
    save_policy(full, tmp_path / "full", base_name="x")
    want = [t for g in score(lora, some_groups()) for s in g for t in s.token_logps]
    for policy in (full, cache.policy(PolicyRef(str(tmp_path / "full")))):
        got = [t for g in score(policy, some_groups()) for s in g for t in s.token_logps]
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert weight_files(tmp_path / "full")


def test_the_pool_drops_the_least_recently_used_base(tmp_path: Path) -> None:
    names = [str(tmp_path / letter) for letter in "abc"]
    for k, name in enumerate(names):
        model_of("llama", seed=k).save_pretrained(name)
    size = sum(p.numel() * 4 for p in model_of("llama").parameters())
    cache = ModelCache(budget_bytes=2 * size)
    for name in (names[0], names[1], names[0], names[2]):
        cache.policy(PolicyRef(name))
    assert (cache.resident, cache.loads) == ((names[0], names[2]), 3)
    cache.policy(PolicyRef(names[1]))
    assert (cache.resident, cache.loads) == ((names[2], names[1]), 4)
    shutil.rmtree(names[1])
    model_of("llama", seed=9).save_pretrained(names[1])  # other weights under the same name
    changed = score(cache.policy(PolicyRef(names[1])), some_groups())
    assert cache.loads == 5 and changed == score(model_of("llama", seed=9), some_groups())
    cache.release()
    assert cache.resident == ()
    with pytest.raises(ResourceError, match="the budget is"):
        ModelCache(budget_bytes=size - 1).policy(PolicyRef(names[0]))


def test_whole_models_of_a_run_are_dropped_once_no_stage_reads_them(tmp_path: Path) -> None:
    names = [tmp_path / "run" / stage / "policy" for stage in ("01-one", "02-two")] + [tmp_path / "base"]
    cache = ModelCache()
    for k, name in enumerate(names):
        model_of("llama", seed=k).save_pretrained(name)
        cache.policy(PolicyRef(str(name)))
    cache.keep(tmp_path / "run", [names[1].parent])
    assert cache.resident == (str(names[1]), str(names[2]))


def test_the_host_memory_is_what_a_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host_memory([])
    for text, wanted in (("max\n", whole), (f"{2**30}\n", 2**30), (f"{2**62}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert host_memory([tmp_path / "memory.max", tmp_path / "none"]) == wanted
    compute = ComputeSettings(device="cpu", jobs=2)
    alone = memory_budget(compute)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert abs(memory_budget(compute) - alone / 4) < 2


def test_an_adapter_that_differs_from_the_settings_is_refused(llama: Path, tmp_path: Path) -> None:
    cache = ModelCache()
    save_policy(cache.policy(PolicyRef(str(llama)), LORA), tmp_path, base_name="x")
    with pytest.raises(ConfigError, match="has rank 2 and alpha 16, the settings say 4 and 16"):
        cache.policy(PolicyRef(str(llama), str(tmp_path)), LoraSettings(rank=4))
    with pytest.raises(ConfigError, match="the settings say q_proj"):
        cache.policy(PolicyRef(str(llama), str(tmp_path)), LoraSettings(rank=2, target_modules=("q_proj",)))
    with pytest.raises(ConfigError, match="choose from down_proj, gate_proj"):
        cache.policy(PolicyRef(str(llama)), LoraSettings(target_modules=("query",)))


# --- loading: input that nobody vouches for ---


def copy_of(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def refuse(folder: Path | str, kind: type[MacpoError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_causal_lm(folder)
    text = str(caught.value)
    assert "Fix:" in text and "\n" not in text


def test_pickled_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, ConfigError, "only pickled weights .pytorch_model.bin.")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "missing.safetensors"]
)
def test_an_index_that_points_elsewhere_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(llama, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refuse(folder, ConfigError, "not a plain file name|is missing")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_weights_that_are_no_regular_file_inside_are_refused(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = copy_of(llama, tmp_path)
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    if kind == "link":
        weights.symlink_to(tmp_path / "outside.safetensors")
    else:
        os.mkfifo(weights)
    refuse(
        folder, ConfigError, "not a regular file inside" if kind == "link" else "a FIFO in the place of a regular file"
    )


def test_damaged_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    refuse(folder, IntegrityError, "should have")
    weights.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    refuse(folder, IntegrityError, "header of")
    weights.write_bytes(data[:8] + b"x" * 64 + data[72:])
    refuse(folder, IntegrityError, "damaged header")


def test_missing_and_misshapen_weights_are_refused_not_drawn_at_random(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    full = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(folder, ConfigError, "model.layers.1.mlp.up_proj.weight")
    full["model.norm.weight"] = full["model.norm.weight"][:-1].clone()
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(folder, ConfigError, "model.norm.weight")


def test_a_path_that_is_not_there_and_a_model_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(tmp_path / "nowhere", ConfigError, "no model folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("some-owner/never-downloaded", ConfigError, "some-owner/never-downloaded.*HF_HUB_OFFLINE=1")


def test_remote_code_is_refused_unless_trusted(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refuse(folder, ConfigError, "trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_for_another_model_or_pickled_is_refused(llama: Path, tmp_path: Path) -> None:
    cache = ModelCache()
    save_policy(cache.policy(PolicyRef(str(llama)), LORA), tmp_path / "a", base_name="x")
    model_of("llama", num_hidden_layers=1).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="do not match the base model"):
        cache.policy(PolicyRef(str(tmp_path / "small"), str(tmp_path / "a")))
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ConfigError, match="only pickled weights"):
        cache.policy(PolicyRef(str(llama), str(tmp_path / "a")))


def test_an_adapter_on_the_head_that_is_not_plain_lora_is_refused_with_its_remedy() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"not plain LoRA\. Fix: leave lm_head out of target_modules"):
        PolicyModule(get_peft_model(model_of("llama"), config))


def test_more_tokens_than_embedding_rows_are_refused(llama: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from macpo.engine.generation.vocabulary import check_vocab

    model = load_causal_lm(llama)
    words = {f"w{k}": k for k in range(VOCAB + 1)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    with pytest.raises(ConfigError, match=rf"vocabulary {VOCAB + 1}\) but the model has {VOCAB} embedding rows"):
        check_vocab(model, tokenizer)
    words.pop(f"w{VOCAB}")
    check_vocab(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))))


def test_the_fingerprint_follows_weights_and_config(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    assert fingerprint_model(folder) == fingerprint_model(llama)
    (folder / "README.md").write_text("not part of the model")
    assert fingerprint_model(folder) == fingerprint_model(llama)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint_model(folder) != fingerprint_model(llama)
    assert fingerprint_model("owner/name") == "hub:owner/name"
