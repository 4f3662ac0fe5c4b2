"""FusedDPOTrainer beside TRL's DPOTrainer: the same numbers, or a refusal by name."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_models import SIZES, WORDS, llama, logged, text_pairs, tokenizer
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

from macpo.engine.errors import ConfigError, DataError
from macpo.integrations.packed import enable, padded_groups
from macpo.integrations.trl import FusedDPOTrainer

NEEDS_LOGITS = {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


def config(tmp_path: Path, **changes: Any) -> DPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "max_steps": 5, "logging_steps": 1, "learning_rate": 2e-3, "use_cpu": True, "bf16": False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.1,
    }  # fmt: skip
    return DPOConfig(**settings | changes)


def trainer(
    kind: type[DPOTrainer], tmp_path: Path, model: Any = None, ref: Any = "other", **changes: Any
) -> DPOTrainer:
    args = config(tmp_path, **changes)
    return kind(
        copy.deepcopy(llama(0) if model is None else model),
        ref_model=llama(1) if ref == "other" else ref,
        args=args,
        train_dataset=text_pairs(30),
        eval_dataset=text_pairs(7, seed=1),
        processing_class=tokenizer(),
    )


def assert_same_training(theirs: DPOTrainer, ours: DPOTrainer, loss_tolerance: float = 1e-4) -> None:
    """Train both; every logged number, the evaluation and the final weights are the same."""
    start = [p.detach().clone() for p in theirs.model.parameters()]
    for each in (theirs, ours):
        each.train()
    names = {name for row in theirs.state.log_history for name in row if "runtime" not in name and "_per_" not in name}
    for name in names - NEEDS_LOGITS - {"train_loss", "total_flos"}:
        expected, got = (logged(each.state.log_history, name) for each in (theirs, ours))
        assert len(got) == len(expected) > 0, name
        scale = 1.0 if name == "loss" else max(1.0, *map(abs, expected))
        assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < loss_tolerance * scale, name
    assert not NEEDS_LOGITS & {name for row in ours.state.log_history for name in row}
    moved = 0.0
    for before, a, b in zip(start, theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4
        moved = max(moved, (a - before).abs().max().item())
    assert moved > 5e-3  # the weights did move, 50 times further than they may differ
    expected, got = (each.evaluate() for each in (theirs, ours))
    for name in expected:
        if name.removeprefix("eval_") not in NEEDS_LOGITS and "runtime" not in name and "_per_" not in name:
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


# --- TRL ---------------------------------------------------------------------------------------------------------


def test_twenty_steps_equal_trl(tmp_path):
    """Checkpointing (TRL's default), two micro-batches a step, four epochs, weight decay, a learning-rate ramp."""
    theirs, ours = (trainer(kind, tmp_path, max_steps=20) for kind in (DPOTrainer, FusedDPOTrainer))
    assert theirs.args.gradient_checkpointing
    assert_same_training(theirs, ours)
    losses = logged(ours.state.log_history, "loss")
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.2


MIX = {"loss_type": ["ipo", "robust", "hinge", "sft"], "loss_weights": [0.1, 1.0, 0.2, 0.3]}
CASES: dict[str, dict[str, Any]] = {
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "robust, weighted": {"loss_type": ["robust"], "loss_weights": [0.7], "label_smoothing": 0.2, "max_length": 9},
    "list, ld_alpha": {**MIX, "label_smoothing": 0.1, "ld_alpha": 0.4},
    "hinge, ld_alpha": {"loss_type": "hinge", "ld_alpha": 0.0, "dataloader_num_workers": 1},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "keep_end": {"truncation_mode": "keep_end", "max_length": 10, "gradient_checkpointing": False},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_settings_equal_trl(tmp_path, name):
    assert_same_training(*(trainer(kind, tmp_path, **CASES[name]) for kind in (DPOTrainer, FusedDPOTrainer)))


def lora(model: Any, seed: int) -> Any:
    """An adapter that already changes the model."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return wrapped


@pytest.mark.parametrize("reference", ["base under a new adapter", "copy of the adapter", "model"])
def test_adapters_equal_trl(tmp_path, reference):
    def make(kind):
        if reference != "base under a new adapter":
            return trainer(kind, tmp_path, lora(llama(0), 2), llama(1) if reference == "model" else None)
        return kind(
            llama(0), None, config(tmp_path), train_dataset=text_pairs(30), eval_dataset=text_pairs(7, seed=1),
            processing_class=tokenizer(), peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        )  # fmt: skip

    theirs, ours = make(DPOTrainer), make(FusedDPOTrainer)
    assert ("ref" in ours.model.peft_config) == (reference == "copy of the adapter")
    assert_same_training(theirs, ours)
    if reference != "model":
        assert logged(ours.state.log_history, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_precomputed_reference_equals_trl(tmp_path):
    """Each trainer gets pairs of its own order, because TRL caches what the other has computed."""
    theirs = trainer(DPOTrainer, tmp_path, precompute_ref_log_probs=True, ld_alpha=0.3)
    ours = FusedDPOTrainer(
        llama(0), llama(1), theirs.args, train_dataset=text_pairs(30).select(range(29, -1, -1)),
        processing_class=tokenizer(),
    )  # fmt: skip
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours.train_dataset[name][::-1] == pytest.approx(theirs.train_dataset[name][:], abs=1e-4)
    assert_same_training(theirs, trainer(FusedDPOTrainer, tmp_path, precompute_ref_log_probs=True, ld_alpha=0.3))


def test_a_reference_made_from_the_models_folder_gives_ln_2(tmp_path):
    llama(0).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    ours = FusedDPOTrainer(
        str(tmp_path / "model"), args=config(tmp_path, max_steps=1), train_dataset=text_pairs(12)
    )  # fmt: skip
    ours.train()
    assert logged(ours.state.log_history, "loss") == [pytest.approx(math.log(2), abs=1e-6)]


def test_a_mixture_of_experts_without_its_auxiliary_loss_equals_trl(tmp_path):
    torch.manual_seed(0)
    moe = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    other = copy.deepcopy(moe)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1 * torch.randn_like(other.lm_head.weight))
    with pytest.raises(ConfigError, match=r"auxiliary loss.*router_aux_loss_coef=0\.0"):
        trainer(FusedDPOTrainer, tmp_path, moe, copy.deepcopy(other), router_aux_loss_coef=0.1)
    both = [
        trainer(kind, tmp_path, moe, copy.deepcopy(other), router_aux_loss_coef=0.0)
        for kind in (DPOTrainer, FusedDPOTrainer)
    ]
    assert_same_training(*both)


def test_mixed_precision_is_no_worse_than_trls(tmp_path):
    """bf16 autocast: errors of the log-probs against float32 at most TRL's; the same path twice still gives ln 2."""
    batches, sums = None, {}
    for kind, bf16 in ((DPOTrainer, False), (DPOTrainer, True), (FusedDPOTrainer, True)):
        each = trainer(kind, tmp_path, llama(0, 3.0), llama(0, 3.0), bf16=bf16, max_steps=1, learning_rate=0.0)
        batches = batches or list(each.get_train_dataloader())
        with torch.no_grad():
            parts = [each.compute_ref_log_probs(each.ref_model, dict(batch)) for batch in batches]
        sums[kind, bf16] = torch.cat([x.float() for part in parts for x in part])
    error = {kind: (sums[kind, True] - sums[DPOTrainer, False]).norm().item() for kind in (DPOTrainer, FusedDPOTrainer)}
    assert 0 < error[FusedDPOTrainer] <= 1.1 * error[DPOTrainer]
    each.train()
    assert logged(each.state.log_history, "loss") == [pytest.approx(math.log(2), abs=1e-6)]
    assert all(p.dtype == torch.float32 for p in each.model.parameters())


def test_prompts_run_once_and_predict_hands_out_logits(tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path)
    batch = next(iter(ours.get_train_dataloader()))
    seen = []
    ours.model.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    loss = ours.compute_loss(ours.model.eval(), batch)
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum() // 2
    assert seen == [(1, int(prompts + batch["completion_mask"].sum()))]
    again, out = ours.compute_loss(ours.model, batch, return_outputs=True)
    assert torch.equal(loss, again) and out.logits.shape == (*batch["input_ids"].shape, len(WORDS))
    expected, got = (each.predict(each.eval_dataset) for each in (trainer(DPOTrainer, tmp_path), ours))
    assert got.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], abs=1e-5)
    assert got.predictions == pytest.approx(expected.predictions, abs=1e-5)


def test_a_checkpointed_loss_needs_the_training_step(tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path)
    batch = next(iter(ours.get_train_dataloader()))
    ours.model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="outside training_step"):
        ours.compute_loss(ours.model.train(), batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": ["nca_pair"]}, "loss_type 'nca_pair'"),
        ({"loss_type": ["sigmoid", "simpo"]}, "loss_type 'simpo'"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1: TRL ignores it for sigmoid"),
        ({"loss_type": ["robust"], "label_smoothing": 0.6}, "label_smoothing=0.6"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl'"),
        ({"use_weighting": True}, "use_weighting"),
        ({"padding_free": True}, "padding_free"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"torch_compile": True}, "torch_compile"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"fsdp": "full_shard"}, "fsdp"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_settings_are_refused_by_name_before_any_work(tmp_path, change, message):
    with pytest.raises(ConfigError, match=f"FusedDPOTrainer: {re.escape(message)}") as refused:
        FusedDPOTrainer(None, args=config(tmp_path, **change))
    assert "\n" not in str(refused.value) and "Fix:" in str(refused.value)


def test_a_setting_that_a_later_trl_adds_is_refused(tmp_path):
    later = dataclasses.make_dataclass("Later", [("new_penalty", float, 0.0)], bases=(DPOConfig,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("macpo.integrations.trl.DPOConfig", later)
        with pytest.raises(ConfigError, match="new_penalty is newer"):
            FusedDPOTrainer(None, args=later(output_dir=str(tmp_path), bf16=False, use_cpu=True, new_penalty=0.5))


def test_models_are_refused_by_name(tmp_path):
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=28, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder"):
        enable(t5)
    virtual = get_peft_model(llama(0), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="PREFIX_TUNING: its virtual tokens"):
        enable(virtual)
    with pytest.raises(ConfigError, match="has dropout"):
        trainer(FusedDPOTrainer, tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)))


def test_batches_that_cannot_be_pairs_are_refused():
    ids = torch.arange(12).view(2, 6)
    ones, mask = torch.ones_like(ids), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])  # padding on the left
    groups = padded_groups(ids, left, torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]))
    assert [(g.prompt_ids, g.responses) for g in groups] == [([0, 1], [[2, 3, 4, 5]]), ([8, 9, 10], [[11]])]
    with pytest.raises(DataError, match="gaps"):
        padded_groups(ids, ones, mask)
    with pytest.raises(DataError, match=r"pair 0 of the batch.*no token"):
        padded_groups(ids, ones, torch.ones_like(ids))
    with pytest.raises(DataError, match=r"pair 0 of the batch.*no token"):
        padded_groups(ids, ones, torch.zeros_like(ids))
