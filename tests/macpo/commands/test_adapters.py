"""Models and adapters that a recipe names are checked by check, plan and run before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, get_peft_model
from standalone_runs import make_base, recipe_of
from tiny import tiny
from transformers import AutoModelForCausalLM

from macpo.commands.check import check
from macpo.commands.preflight import preflight
from macpo.commands.run import run
from macpo.config import Recipe
from macpo.engine.errors import ConfigError
from macpo.engine.files import read_json
from macpo.method.policies import policy_ref
from macpo.recipe_kinds import AnyRecipe, plan_of

LORA = {"type": "lora", "rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and adapters of it: plain, with biases, of another kind, and one of a base with other layers."""
    folder = tmp_path_factory.mktemp("models")
    make_base(folder / "base")
    plain: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    for name, config in {
        "plain": LoraConfig(**plain),
        "bias": LoraConfig(**plain, bias="all"),
        "pissa": LoraConfig(**plain, init_lora_weights="pissa"),
        "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "one layer": LoraConfig(**plain, layers_to_transform=[0]),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(model, config).save_pretrained(folder / name)
    file = folder / "one layer" / "adapter_config.json"
    file.write_text(file.read_text().replace('"layers_to_transform": [\n    0\n  ]', '"layers_to_transform": null'))
    return folder


def check_models(recipe: AnyRecipe) -> None:
    preflight(recipe, plan_of(recipe, must_exist=False))


def said_by(command: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        command()
    return str(caught.value)


def of_method(models: Path, output: Path, **student: Any) -> Recipe:
    agent = {"model": str(models / "base"), "tuning": LORA} | student
    return tiny(output, student=agent, teachers=[{"model": str(models / "base"), "tuning": LORA}])


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("preference", {"adapter": "bias"}, "adapter: the adapter trains biases of the base (bias: all)"),
        ("sft", {"adapter": "pissa"}, "adapter: the adapter was trained on a base that its initialisation pissa"),
        ("sft", {"adapter": "ia3"}, "adapter: a IA3 adapter: only LoRA is supported"),
        ("sft", {"adapter": "one layer"}, "adapter: 4 adapter weights do not match the base model"),
        (
            "sft",
            {"adapter": "plain", "rank": 3},
            "adapter: the adapter has rank 2 and alpha 4, the settings say 3",
        ),
        ("sft", {"model": "plain"}, "model: an adapter (adapter_config.json), where a whole model is needed"),
        ("sft", {"target": "embed_tokens"}, "tuning.target_modules: the adapter sits on model.embed_tokens, an embed"),
        ("sft", {"target": "query"}, "tuning.target_modules: LoRA cannot target"),
        ("preference", {"reference": "ia3"}, "training.reference_model: a IA3 adapter"),
    ],
)
def test_a_standalone_recipe_is_refused_by_every_command(
    models: Path, tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    tuning = LORA | {"rank": changes.get("rank", 2), "target_modules": [changes.get("target", "q_proj"), "v_proj"]}
    tree: dict[str, Any] = {"tuning": tuning}
    if "adapter" in changes:
        tree["adapter"] = str(models / changes["adapter"])
    if "reference" in changes:
        tree["training"] = {"reference_model": str(models / changes["reference"])}
    recipe = recipe_of(kind, models / changes.get("model", "base"), tmp_path / "run", **tree)
    assert recipe.recipe != "macpo"
    for command in (lambda: list(check(recipe)), lambda: check_models(recipe), lambda: run(recipe)):
        message = said_by(command)
        assert said in message and "Fix: " in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_the_method_names_all_its_problems_at_once(models: Path, tmp_path: Path) -> None:
    recipe = of_method(
        models, tmp_path / "run", positive=str(models / "bias"), negative=str(models / "ia3"), train=False
    )
    recipe = recipe.model_copy(update={"ablations": {"arm": {"student.positive": str(models / "pissa")}}})
    for command in (lambda: list(check(recipe)), lambda: check_models(recipe), lambda: run(recipe)):
        lines = said_by(command).splitlines()
        assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
        assert "student.positive: the adapter trains biases" in lines[0]
        assert "student.negative: a IA3 adapter" in lines[1]
        assert "student.positive: the adapter was trained on a base" in lines[2]
    assert not (tmp_path / "run").exists()


def test_an_adapter_without_its_base_is_refused(models: Path, tmp_path: Path) -> None:
    recipe = of_method(models, tmp_path / "run")
    alone = recipe.teachers[0].model_copy(update={"model": None, "positive": str(models / "plain")})
    message = said_by(lambda: check_models(recipe.model_copy(update={"teachers": (alone,)})))
    assert "teachers.0.positive: an adapter" in message and f"name its base ({models / 'base'}) as the model" in message


def test_what_is_fine_passes(models: Path, tmp_path: Path) -> None:
    plain = str(models / "plain")
    recipes: list[AnyRecipe] = [
        of_method(models, tmp_path, positive=plain, negative=plain),
        of_method(models, tmp_path, positive=plain, tuning={"type": "full"}),
        recipe_of("sft", models / "base", tmp_path, adapter=plain, tuning=LORA),
        recipe_of("sft", None, tmp_path),
        tiny(tmp_path),
    ]
    for recipe in recipes:
        check_models(recipe)


def test_training_goes_on_from_an_adapter_of_peft(models: Path, tmp_path: Path) -> None:
    recipe = recipe_of("sft", models / "base", tmp_path / "run", adapter=str(models / "plain"), tuning=LORA)
    run(recipe)
    before, after = read_json(tmp_path / "run" / "summary.json")["agents"]["policy"]["scores"]
    assert after["loss"] < before["loss"]


def test_a_ready_policy_from_the_hub_is_told_apart(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its files, not by whether a folder bears its name."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(models / name.split("/")[1]))
    assert policy_ref("owner/base", "owner/plain").adapter == "owner/plain"
    whole = policy_ref("owner/other", "owner/base")
    assert (whole.base, whole.adapter) == ("owner/base", None)
