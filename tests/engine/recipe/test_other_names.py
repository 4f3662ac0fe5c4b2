"""Recipes answer to the names that other trainers have: field, value, and what needs no name at all."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from macpo.engine.config import LossName
from macpo.engine.errors import ConfigError, Problem, beginning, one_line, shown
from macpo.engine.recipe.other_names import FIELDS, NEEDLESS, NOTES, VALUES
from macpo.engine.recipe.problems import _everywhere
from macpo.recipe_kinds import KINDS, load

RECIPES = Path(__file__).parents[3] / "recipes"


def wrong(override: str, recipe: str = "preference") -> str:
    with pytest.raises(ConfigError) as caught:
        load(RECIPES / f"{recipe}.yaml", [override])
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("lr=1e-5", "it is called 'training.learning_rate'"),
        ("training.lr=1e-5", "it is called 'training.learning_rate'"),
        ("max_length=512", "it is called 'context_tokens'"),
        ("cutoff_len=512", "it is called 'context_tokens'"),
        ("sequence_len=512", "it is called 'context_tokens'"),
        ("lora_r=8", "it is called 'tuning.rank'"),
        ("tuning.lora_rank=8", "it is called 'tuning.rank'"),
        ("training.per-device-train-batch-size=4", "it is called 'training.batch'; it is the whole step"),
        ("model_name_or_path=x", "it is called 'model'"),
        ("base_model=x", "it is called 'model'"),
        ("dataset=x", "it is called 'data.path'"),
        ("val_size=0.1", "it is called 'data.test_prompts'; a number of prompts"),
        ("training.pref_beta=0.1", "it is called 'training.beta'"),
        ("training.loss_type=dpo", "it is called 'training.loss'"),
        ("bf16=true", "it is called 'compute.dtype'"),
        ("gradient_checkpointing=true", "it is called 'compute.parallel.checkpointing'"),
        ("lora_dropout=0.05", "leave it out: adapters have no dropout"),
        ("sample_packing=true", "leave it out: rows are always packed"),
        ("training.loss=dpo", "write sigmoid"),
        ("training.loss=rdpo", "write robust"),
        ("training.schedule=constant_with_warmup", "write constant, with warmup_fraction"),
        ("compute.dtype=bf16", "write bfloat16"),
        ("tuning.type=qlora", "write lora, with quantization: nf4"),
        ("tuning.quantization=4", "write nf4"),
        ("tuning.target_modules=all", "write all-linear"),
        ("compute.parallel.sharding=fsdp", "write shard"),
        ("training.loss.beta=0.1", "set training.beta"),
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(override: str, fix: str) -> None:
    assert f" Fix: {fix}" in wrong(override)


def test_where_several_blocks_have_the_field_all_are_named() -> None:
    said = wrong("lr=1e-5", "demo")
    assert "'learning_rate', in teacher_training.positive" in said and "or student_training.preference." in said
    assert "'teachers.0.tuning.rank'" in wrong("teachers.0.lora_r=4", "demo")
    assert "'model', in teachers.0 or student" in wrong("model_name_or_path=x", "demo")


def test_the_kind_of_a_recipe_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("recipe: dpo\n")
    with pytest.raises(ConfigError, match=r"r.yaml:1: recipe: got 'dpo'. Fix: write preference"):
        load(tmp_path / "r.yaml")


def test_the_table_names_fields_and_values_that_recipes_have() -> None:
    places = {place for kind in KINDS.values() for place in _everywhere(kind)}
    for field in FIELDS:
        parts = tuple(field.split("."))
        assert any(place[-len(parts) :] == parts for place in places), field
    assert set(NOTES) <= set(FIELDS)
    names = [name for others in FIELDS.values() for name in others] + list(NEEDLESS)
    assert len(names) == len(set(names)) > 150
    assert not set(names) & {place[-1] for place in _everywhere(KINDS["preference"])}
    assert {ours.partition(",")[0] for ours in VALUES["loss"].values()} <= set(get_args(LossName))


def test_trls_own_names_are_known() -> None:
    """Every setting of a DPO run of TRL that people change is in the table, or has the same name here."""
    trl = pytest.importorskip("trl")
    theirs = {
        field.name for config in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments) for field in fields(config)
    }
    changed = "learning_rate per_device_train_batch_size gradient_accumulation_steps num_train_epochs beta loss_type "
    changed += (
        "max_length output_dir seed bf16 lr_scheduler_type warmup_steps weight_decay max_grad_norm logging_steps "
    )
    changed += (
        "save_steps eval_strategy report_to model_name_or_path lora_r lora_alpha lora_target_modules lora_dropout "
    )
    changed += "load_in_4bit dataset_name dataset_config dataset_train_split gradient_checkpointing optim use_peft"
    assert set(changed.split()) <= theirs
    known = {name for others in FIELDS.values() for name in others} | set(NEEDLESS)
    known |= {place[-1] for place in _everywhere(KINDS["preference"])}
    assert set(changed.split()) <= known


WRONG = (
    ("preference", "training.gamma=0.5"),
    ("preference", "training.loss=simpo"),
    ("preference", "training.beta=0"),
    ("preference", "context_tokens=20"),
    ("preference", "data.test_prompts=5"),
    ("preference", "model=x"),
    ("demo", "use_teachers=[a, b]"),
    ("demo", "use_teachers=[]"),
    ("demo", "teachers.1.name=student"),
    ("demo", "initial.weak_label=x"),
    ("demo", "teachers=[]"),
    ("demo", "evaluation.scorers=[{name: a, kind: gold}, {name: a, kind: gold}]"),
    ("demo", "ablations={x: {compute.threads: 2}}"),
    ("demo", "student={}"),
)


@pytest.mark.parametrize(("name", "override"), WRONG)
def test_errors_name_the_field_once_and_speak_no_python(name: str, override: str) -> None:
    said = wrong(override, name).removeprefix(f"error: --set {override}: ")
    assert not any(word in said for word in ("['", "',)", "None", "Tuple", "dict", "()")), said
    field = override.partition("=")[0]
    assert f"{field}: {field}" not in said and f"{field}: {field.rpartition('.')[2]} " not in said
    assert " Fix: " in said


def test_nothing_is_cut_inside_a_word() -> None:
    words = [f"word{number}" for number in range(200)]
    text = " ".join(words)
    for cut in (beginning(text, 60), one_line(text, 77), shown(text, 90).strip('"'), str(Problem(text, text))):
        assert set(cut.replace("…", " ").split()) <= {*words, "error:", "Fix:", "word199."}, cut
    assert beginning("a" * 100, 10) == "a" * 9 + "…"  # one long word has to be
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert shown(loop) == "a dict" and shown({"a": [1, None, True]}) == '{"a": [1, null, true]}'
