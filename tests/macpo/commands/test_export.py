"""`macpo export`: adapters, merged and full models, read back by plain libraries; FAULTS 41."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from standalone_runs import make_base, recipe_of
from tiny import OPTIM, init, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from macpo.commands.export import Choice, export, named_agent
from macpo.commands.run import run
from macpo.config import Recipe
from macpo.engine.data.chat import Chat
from macpo.engine.errors import ConfigError, IntegrityError
from macpo.engine.files import read_json
from macpo.engine.foreign import header
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import saving as exporting
from macpo.engine.models.loading import stored_dtype
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import save_policy
from macpo.engine.run.folder import folder_of
from macpo.engine.run.manifest import Manifest
from macpo.standalone.config import SftRecipe

IDS = torch.tensor([[1, 5, 9, 7, 3]])


@pytest.fixture(scope="module")
def finished(tiny_run: Path) -> tuple[Path, Recipe]:
    return tiny_run, tiny(tiny_run, iterations=1)


def exported(finished: tuple[Path, Recipe], out: Path, agent: str, **changes: object) -> Path:
    run_dir, recipe = finished
    return export(run_dir, recipe, out, Choice(agent=agent, **changes))[0]  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_full_student_loads_with_transformers_alone(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    out = exported(finished, tmp_path / "student", "student")
    model = AutoModelForCausalLM.from_pretrained(out)
    own = AutoModelForCausalLM.from_pretrained(folder_of(finished[0], "iter1-student-train") / "policy")
    assert torch.equal(logits(model), logits(own))
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = Chat(AutoTokenizer.from_pretrained(folder_of(finished[0], "base-student") / "model"), finished[1].template)
    messages = [{"role": "user", "content": "how do i bake a cake ?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == chat.prompt_ids(messages) and model.generation_config.eos_token_id == list(chat.stop_ids)


def test_plain_generation_stops_where_training_ended(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    """The end token is the third token that the model writes, and not the tokenizer's own."""
    folder = folder_of(finished[0], "iter1-student-train") / "policy"
    tokenizer, policy = AutoTokenizer.from_pretrained(folder), ModelCache().policy(PolicyRef(str(folder)))
    policy.base.generation_config.eos_token_id = None
    written = policy.base.generate(IDS, max_new_tokens=12, do_sample=False)[0, IDS.shape[1] :].tolist()
    end = next(token for token in reversed(written[:3]) if token != tokenizer.eos_token_id)
    chat = Chat(tokenizer, eos_token=tokenizer.convert_ids_to_tokens(end))
    assert chat.reply_ids([{"role": "user", "content": "x"}], "cake")[-1] == end
    save_policy(policy, tmp_path / "out", base_name="x", chat=chat)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = model.generate(IDS, max_new_tokens=12, do_sample=False)[0, IDS.shape[1] :].tolist()
    assert again == written[: written.index(end) + 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == end


def card_of(out: Path) -> tuple[dict[str, Any], str]:
    """Metadata for the Hub, and the text."""
    card = ModelCard((out / "README.md").read_text())
    return card.data.to_dict(), card.text


def test_the_card_says_what_the_run_did_and_no_more(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    data, text = card_of(exported(finished, tmp_path / "student", "student"))
    assert data["base_model"] == "base-student" and data["library_name"] == "transformers"
    assert data["tags"] == ["macpo", "preference-optimisation", "weak-to-strong"] and "license" not in data
    assert "2410.07672" in text and "iteration 1 of 1" in text and "demo world" in text and "grants no licence" in text
    training = Manifest.read(folder_of(finished[0], "iter1-student-train")).settings
    for name, value in (("learning_rate", "0.001"), ("batch", 8), ("loss", "sigmoid"), ("tuning.type", "full")):
        assert f"| {name} | {value} |" in text, name
    assert f"| seed | {training['seed']} |" in text
    evaluation = read_json(folder_of(finished[0], "eval-student-iter1") / "evaluation.json")
    assert f"| gold | {evaluation['gold']:.6g} |" in text and "| answers | 12 |" in text

    assert "Chat template: `vicuna`" in text and "A response ends with `</s>`" in text
    data, text = card_of(exported(finished, tmp_path / "negative", "teacher1", policy="negative"))
    assert "trained to behave badly" in text and data["library_name"] == "peft"
    assert "## Evaluation" not in text and "| tuning.rank | 2 |" in text and "supervised fine-tuning" in text


def test_a_standalone_run_exports_its_one_policy(tmp_path: Path) -> None:
    tree = tiny(tmp_path).model_dump(mode="json")
    agent = {"init": init(16), "tuning": {"type": "lora", "rank": 2, "target_modules": "all-linear"}}
    kept = {name: tree[name] for name in ("template", "context_tokens", "compute")}
    kept["compute"] = {key: tree["compute"][key] for key in ("device", "dtype", "threads")}  # nothing is generated
    data = {"world": tree["data"]["world"]}
    recipe = SftRecipe.model_validate({"output": str(tmp_path / "run"), "data": data, "training": OPTIM} | agent | kept)
    run(recipe)
    out, _ = export(tmp_path / "run", recipe, tmp_path / "out", Choice(merge=True))
    assert (out / "model.safetensors").exists()
    data, text = card_of(out)
    assert data["tags"] == ["macpo", "sft"] and "supervised fine-tuning" in text and "| perplexity |" in text
    out, _ = export(tmp_path / "run", recipe, tmp_path / "before", Choice(iteration=0))
    assert "not trained in this run" in card_of(out)[1]


def test_an_adapter_and_its_merge_agree(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    adapter = exported(finished, tmp_path / "adapter", "teacher1")
    merged = exported(finished, tmp_path / "merged", "teacher1", merge=True)
    assert (adapter / "adapter_model.safetensors").exists() and not (merged / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(folder_of(finished[0], "base-teacher1") / "model")
    with_adapter = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits(with_adapter), logits(AutoModelForCausalLM.from_pretrained(merged)))


def test_every_iteration_and_the_ceiling_can_be_had(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    start = exported(finished, tmp_path / "start", "student", iteration=0)
    end = exported(finished, tmp_path / "end", "student", iteration=1)
    top = exported(finished, tmp_path / "ceiling", "ceiling", iteration=0)
    models = [logits(AutoModelForCausalLM.from_pretrained(out)) for out in (start, end, top)]
    assert not torch.equal(models[0], models[1]) and not torch.equal(models[1], models[2])


def test_the_student_can_be_asked_for_by_its_role(tmp_path: Path) -> None:
    tree = tiny(tmp_path).model_dump(mode="json")
    tree["student"]["name"] = "gemma"
    renamed = Recipe.model_validate(tree)
    weak = tree["teachers"][0]["name"]
    tree["teachers"][0]["name"] = "student"
    called = Recipe.model_validate(tree)
    assert [named_agent(renamed, asked) for asked in ("", "student", "gemma", weak)] == ["gemma"] * 3 + [weak]
    assert named_agent(called, "student") == "student" and named_agent(called, "") == "gemma"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"agent": "teacher7"}, "no agent 'teacher7'"),
        ({"iteration": 5}, "no iteration 5"),
        ({"agent": "ceiling", "policy": "negative"}, "no negative policy"),
    ],
)
def test_what_is_not_there_is_named(
    finished: tuple[Path, Recipe], tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        exported(finished, tmp_path / "out", **({"agent": "student"} | change))  # type: ignore[arg-type]


def test_an_existing_folder_is_not_overwritten(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        exported(finished, tmp_path, "student")


def test_what_reads_back_differently_never_counts(
    finished: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that changes on its way to the disk is found by the logits."""
    save = exporting.save_policy

    def damaging(policy: PolicyModule, folder: Path, **words: object) -> None:
        save(policy, folder, **words)  # type: ignore[arg-type]
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "save_policy", damaging)
    with pytest.raises(IntegrityError, match="logits differ"):
        exported(finished, tmp_path / "out", "student")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing_that_looks_done(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    def dying() -> None:
        os.environ["MACPO_KILL_AT"] = "file-written:1"
        exported(finished, tmp_path / "out", "student")

    assert forked(dying) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (exported(finished, tmp_path / "out", "student") / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out.tmp", ".out.macpo-export"])
def test_what_was_there_before_stays_as_it_is(finished: tuple[Path, Recipe], tmp_path: Path, name: str) -> None:
    """FAULTS 52, also where the user's folder bears the very name that the export works under."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    if name == "out.tmp":
        exported(finished, tmp_path / "out", "student")
    else:
        with pytest.raises(ConfigError, match="exists"):
            exported(finished, tmp_path / "out", "student")
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_not_replaced(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists"):
        exported(finished, tmp_path / "out", "student")


def test_an_adapter_names_its_base_for_every_working_directory(
    finished: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base that the run made, from a run folder and a target that were given relative to another folder."""
    run_dir, recipe = finished
    monkeypatch.chdir(run_dir.parent)
    out, base = export(Path(run_dir.name), recipe, Path("relative"), Choice(agent="teacher1"))
    monkeypatch.chdir(tmp_path)
    named = read_json(out / "adapter_config.json")["base_model_name_or_path"]
    assert named == base and Path(named).is_absolute()
    again = AutoPeftModelForCausalLM.from_pretrained(out)
    own = folder_of(run_dir, "iter1-teacher1-train") / "policy"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), own)
    assert torch.equal(logits(again), logits(theirs))


@pytest.mark.parametrize("merge", [False, True])
def test_weights_are_written_in_the_dtype_that_is_asked_for(
    finished: tuple[Path, Recipe], tmp_path: Path, merge: bool
) -> None:
    out = exported(finished, tmp_path / "half", "teacher1", merge=merge, dtype="bfloat16")
    file = out / ("model.safetensors" if merge else "adapter_model.safetensors")
    assert {entry.dtype for entry in header(file).values()} == {"BF16"}
    if merge:
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_whole_model_is_written_in_the_dtype_of_its_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    recipe = recipe_of("sft", base, tmp_path / "run", tuning={"type": "full"})
    run(recipe)
    out, named = export(tmp_path / "run", recipe, tmp_path / "out", Choice())
    assert named is None and stored_dtype(out) == torch.bfloat16
    out, _ = export(tmp_path / "run", recipe, tmp_path / "whole", Choice(dtype="float32"))
    trained = AutoModelForCausalLM.from_pretrained(folder_of(tmp_path / "run", "train-policy") / "policy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(trained))


def test_an_adapter_of_the_run_names_a_given_base_for_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter sits on the output layer, which is tied to the embedding: only the merged model is untied."""
    make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    tuning = {"type": "lora", "rank": 2, "target_modules": ["q_proj", "lm_head"]}
    training = {"learning_rate": 0.05, "batch": 8}
    recipe = recipe_of("sft", Path("base"), Path("run"), tuning=tuning, training=training)
    run(recipe)
    made = folder_of(Path("run"), "train-policy") / "policy"
    assert read_json(made / "adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "base")
    (adapter, _), (merged, _) = (export(Path("run"), recipe, Path(n), Choice(merge=n == "m")) for n in ("a", "m"))
    monkeypatch.chdir("/")
    with_adapter = AutoPeftModelForCausalLM.from_pretrained(adapter)
    alone = AutoModelForCausalLM.from_pretrained(merged)
    assert not alone.config.tie_word_embeddings
    assert torch.equal(alone.get_input_embeddings().weight, with_adapter.get_base_model().get_input_embeddings().weight)
    torch.testing.assert_close(logits(alone), logits(with_adapter), rtol=1e-5, atol=1e-5)
