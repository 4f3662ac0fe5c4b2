"""`recipe: sft` and `recipe: preference` from the command line, and every layout of data."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import macpo, torchrun
from forks import forked
from standalone_runs import INIT, OPTIM, content, make_base, recipe_of
from tiny import tiny

from macpo import bundled, recipe_kinds
from macpo.commands.run import run, run_recipe
from macpo.data.examples import load_examples
from macpo.data.rows import Source
from macpo.engine import faults
from macpo.engine import train as entry
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.model_folders import fingerprint_model
from macpo.engine.recipe import dump, kind_of
from macpo.engine.run.executor import Executor
from macpo.engine.run.folder import folder_of
from macpo.engine.run.stages import Stage
from macpo.methods.registry import build_plan
from macpo.standalone.config import ExampleData, Standalone
from macpo.standalone.records import Sets, read_sets

ROOT = Path(__file__).parents[2]
INIT |= {"pretrain": {"learning_rate": 3e-3, "batch": 8, "max_documents": 60}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


def write(recipe: Standalone, path: Path) -> Path:
    path.write_text(dump(recipe, comments=True))
    return path


def losses_of(run_dir: Path) -> list[float]:
    lines = (folder_of(run_dir, "train-policy") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# --- from the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_run_from_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model made on the spot: check, run, status, report; a second run does nothing, a changed one is refused."""
    path = write(recipe_of(kind, None, tmp_path / "run"), tmp_path / "recipe.yaml")
    assert kind_of(path)[0] == kind
    assert macpo("check", path, "--examples", 1) == 0
    said = capsys.readouterr().out
    assert "32 to train on, 12 held out" in said and ("[CHOSEN" in said) == (kind == "preference")

    assert macpo("run", path) == 0
    said = capsys.readouterr().out
    assert "report.html" in said and re.search(r"policy +policy +\d", said)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["agents"]["policy"]["role"] == "policy" and summary["seed"] == 0
    before, after = summary["agents"]["policy"]["scores"]
    assert after["loss"] < before["loss"]
    if kind == "sft":
        assert before["perplexity"] == pytest.approx(math.exp(before["loss"]))
    else:
        assert before["loss"] == pytest.approx(math.log(2)) and before["preference_accuracy"] == 0.5
        assert after["preference_accuracy"] > 0.5 and after["reward_margin"] > 0
    names = [stage["name"] for stage in summary["stages"]]
    expected = ["data", "base-policy", "reference", "eval-policy-iter0", "train-policy", "eval-policy-iter1"]
    assert names == [name for name in expected if name != "reference" or kind == "preference"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("Preference training: run" if kind == "preference" else "Supervised fine-tuning: run") in page

    assert macpo("status", tmp_path / "run") == 0
    assert set(re.findall(r"^(\w+)", capsys.readouterr().out, re.M)) == {"done"}
    assert macpo("run", tmp_path / "run") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert macpo("report", tmp_path / "run") == 0
    capsys.readouterr()
    assert macpo("run", path, "--set", "training.learning_rate=0.01") == 2
    assert "learning_rate: 0.001 -> 0.01" in capsys.readouterr().err
    assert macpo("run", path, "--set", "training.learning_rate=0.01", "--rerun-stale") == 0


def test_two_ranks_train_a_folder_model_as_one_process_does(base: Path, tmp_path: Path) -> None:
    """Through torchrun: LoRA on a model folder, local JSONL, data held out of another file."""
    rows = [{"prompt": f"how do i sit {i} ?", "chosen": f"thanks {i} .", "rejected": "no"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    data = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl"), "test_prompts": 4}

    def recipe(output: str) -> Standalone:
        return recipe_of("preference", base, tmp_path / output, data=data)

    ended = torchrun(write(recipe("two"), tmp_path / "two.yaml"))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert macpo("run", write(recipe("one"), tmp_path / "one.yaml")) == 0
    assert len(losses_of(tmp_path / "one")) == 2  # 20 prompts, 4 of them held out
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert (folder_of(tmp_path / "two", "train-policy") / "policy" / "adapter_config.json").exists()
    scores = [
        json.loads((tmp_path / name / "summary.json").read_text())["agents"]["policy"]["scores"][1]
        for name in ("one", "two")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    counts = json.loads((folder_of(tmp_path / "one", "data") / "counts.json").read_text())
    assert counts["input"]["train_test_overlap_dropped"] == 4


def test_killed_in_every_stage_ends_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    """The reference's cache included: killed in the middle of it, and used again by the stage that goes on."""
    training = OPTIM | {"save_every_steps": 1}

    def go(name: str, stage: str = "", point: str = "", count: int = 1) -> None:
        execute = Executor.execute

        def armed(self: Executor, each: Stage, digests: Mapping[str, str]) -> dict[str, Any]:
            if each.name == stage:
                faults._passed.clear()
                os.environ["MACPO_KILL_AT"] = f"{point}:{count}"
            return execute(self, each, digests)

        Executor.execute = armed  # type: ignore[method-assign]  # in a forked child only
        run(recipe_of("preference", base, tmp_path / name, training=training))

    assert forked(lambda: go("clean")) == 0
    for kill in (
        ("data", "file-written", 2),
        ("reference", "file-written", 2),  # the cache's first entry, after the marker of the stage
        ("reference", "file-created", 5),
        ("eval-policy-iter0", "stage-hashed", 1),
        ("train-policy", "checkpoint-renamed", 2),
        ("eval-policy-iter1", "stage-manifest", 1),
    ):
        assert forked(functools.partial(go, "killed", *kill)) == -signal.SIGKILL, kill
        torn = list((tmp_path / "killed").glob("cache/.*.part"))
        assert len(torn) == (kill[:2] == ("reference", "file-written")), kill
    assert forked(lambda: go("killed")) == 0
    assert not list((tmp_path / "killed").rglob(".*.part"))
    assert content(tmp_path / "killed") == content(tmp_path / "clean")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("recipe: dpo", "recipe: got 'dpo'. Fix: write preference"),
        (
            "training: {loss: hinge, label_smoothing: 0.1}",
            "training.label_smoothing belongs to robust",
        ),
        ("training: {loss: ipo, ld_alpha: 0.5}", "training.ld_alpha belongs to hinge, robust, sigmoid"),
        ("training: {gamma: 0.5}", "training.gamma belongs to simpo"),
        ("training: {loss: simpo}", "training.gamma is missing"),
        ("training: {loss: orpo, reference: adapter-off}", "training.reference belongs to"),
        (
            "training: {loss: simpo, gamma: 1.0, reference_model: x}",
            "training.reference_model belongs",
        ),
        ("training: {reference: adapter-off, reference_model: x}", "training.reference_model is a"),
        ("training: {loss: dpo}", "training.loss: got \"dpo\", allowed: 'sigmoid'"),
        ("training: {reference: adapter-off}\ntuning: {type: full}", "training.reference: adapter-off needs"),
        ("adapter: x\ninit: {}", "adapter belongs to `model`"),
        ("data: {path: x, format: messages}", "data.format: got \"messages\", allowed: 'auto', 'hh'"),
        ("data: {path: x, test_path: y, test_split: z}", "data.test_split is for `path`"),
        ("data: {path: x, side: chosen}", "data.side: unknown key"),
        ("prompt_tokens: 2000", "prompt_tokens (2000) leaves no room"),
        ("compute: {wave_requests: 3}", "compute.wave_requests is for generation"),
        ("sampling: {}\ncontext_tokens: 64", "sampling.max_new_tokens (512) after a prompt of 32 tokens is beyond"),
        ("teachers: []", "teachers: unknown key"),
    ],
)
def test_bad_options_are_one_line_with_its_number(
    lines: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"recipe": "recipe: preference", "data": "data: {path: x}", "model": "model: y"}
    tree |= {line.partition(":")[0]: line for line in lines.splitlines()}
    if "init" in tree:
        del tree["model"]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(tree.values()))
    assert macpo("run", path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    key = lines.partition(":")[0]
    number = list(tree).index(key) + 1
    assert said.startswith(f"error: {path}:{number}: ") and expected in said and " Fix: " in said


def test_the_file_decides_of_which_kind_it_is(base: Path, tmp_path: Path) -> None:
    path = write(recipe_of("sft", base, tmp_path / "run"), tmp_path / "recipe.yaml")
    assert entry.runner(path) is run_recipe
    path.write_text("seed: 0\nrecipe: grpo\n")
    problem = f"{path}:2: recipe: no package runs recipes of kind 'grpo'. Fix: use macpo or preference or reward or sft"
    with pytest.raises(ConfigError, match=re.escape(problem)):
        entry.runner(path)
    path.write_text("seed: 0\n")
    assert entry.runner(path) is run_recipe


def test_torchrun_too_takes_a_bundled_recipe_by_its_name(tmp_path: Path) -> None:
    assert entry.runner(Path("preference")) is run_recipe
    small = [f"data.world.{name}=20" for name in ("student_documents", "student_prompts", "test_prompts")]
    done = run_recipe(Path("preference"), [f"output={tmp_path / 'run'}", *small])
    assert (done / "report.html").exists()


@pytest.mark.parametrize("kind", ["sft", "preference", "reward"])
def test_the_line_for_ones_own_model_leaves_no_size_of_the_demo(kind: str) -> None:
    path = bundled.folder() / f"{kind}.yaml"
    (line,) = re.findall(r"^# +macpo .*? --set .*\\\n(?:#.*\\\n)*#.*", path.read_text(), re.M)
    words = shlex.split(line.replace("\\\n#", ""), comments=False)
    overrides = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    recipe = recipe_kinds.load(path, [each.replace("PATH", "folder") for each in overrides])
    assert recipe.context_tokens == 1024 and recipe.max_prompt_tokens == 512 and recipe.agents[0].init is None


@pytest.mark.parametrize(
    ("changes", "said"), [({"prompt_tokens": 8}, "8, prompt_tokens"), ({}, "32, half of context_tokens")]
)
def test_check_says_which_setting_limits_a_prompt(
    changes: dict[str, int], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe_of("sft", base, tmp_path / "run", **changes), tmp_path / "recipe.yaml")
    assert macpo("check", path, "--examples", 0) == 0
    assert f"are longer than {said} (data.long_prompt: truncate)" in capsys.readouterr().out


# --- data -----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
RESPONSE = {"role": "assistant", "content": "good day"}
SHAREGPT = [{"from": "human", "value": "hello"}]


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"messages": [*CHAT, RESPONSE]}, CHAT, "good day"),
        ({"prompt": "hello", "response": " good day "}, CHAT[1:], " good day "),
        ({"prompt": "hello", "completion": "good day"}, CHAT[1:], "good day"),
        ({"prompt": CHAT, "completion": [RESPONSE]}, CHAT, "good day"),
        ({"instruction": "hello", "input": "", "output": "good day", "system": "be kind"}, CHAT, "good day"),
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "good day"}], "system": "be kind"}, CHAT, "good day"),
        ({"chosen": "\n\nHuman: hello\n\nAssistant: good day", "rejected": "\n\nHuman: hello\n\nAssistant: no"},
         CHAT[1:], "good day"),
        ({"prompt": "hello", "chosen": "good day", "rejected": "no"}, CHAT[1:], "good day"),
        ({"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "good day"},
          "rejected": {"from": "gpt", "value": "no"}}, CHAT[1:], "good day"),
    ],
    ids=["messages", "response", "completion", "chat", "alpaca", "sharegpt", "hh", "pairs", "sharegpt-pairs"],
)  # fmt: skip
def test_layouts_of_single_responses(row: dict[str, Any], prompt: Any, response: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    (example,), counts = load_examples(path)
    assert list(example.prompt.messages) == prompt and example.response == response and counts["rows"] == 1
    if "chosen" in row:
        (worse,), _ = load_examples(path, format="rejected")
        assert worse.response == "no" and worse.prompt == example.prompt


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT}, "messages: the last message is from 'user', not the assistant"),
        ({"messages": [RESPONSE]}, "prompt: what precedes the response does not end with the user's message"),
        ({"prompt": "hello", "response": "  "}, "response: the response is empty"),
        ({"prompt": "hello", "response": None}, "response: null"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations: not a message"),
        ({"text": "hello"}, "prompt: missing, and the keys fit none of the formats"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=re.escape(f"{path}:1: {said}")):
        load_examples(path)


def test_columns_have_other_names_and_prompts_are_held_out_by_content(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"q{i % 9}", "answer": f"a{i}"} for i in range(18)]  # every prompt twice
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "columns": {"prompt": "question", "response": "answer"}, "test_prompts": 3}

    def sets_of(seed: int = 0, **changes: Any) -> Sets:
        return read_sets(ExampleData(**data | changes), seed)

    sets = sets_of()
    held, used = ({record.prompt.id for record in part} for part in (sets.test, sets.train))
    assert (len(held), len(used), len(sets.train), len(sets.documents)) == (3, 6, 12, 0) and not held & used
    assert {record.prompt.id for record in sets_of(seed=1).test} != held
    assert [r.prompt.id for r in sets_of(test_prompts=2).test] == [record.prompt.id for record in sets.test[:2]], (
        "a smaller test set is a part of a larger one"
    )
    limited = sets_of(train_prompts=4)
    assert len(limited.train) == 8 and len(limited.documents) == 4, "what is left over is for pretraining"
    with pytest.raises(DataError, match="0 distinct prompts are left to train on and 9 to evaluate on"):
        sets_of(test_prompts=9)
    with pytest.raises(ConfigError, match=r"data\.columns: got 'promt'"):
        load_examples(Source(path, columns={"promt": "question"}))


def test_the_method_takes_every_loss_and_refuses_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    made = tiny(tmp_path, student_training={"preference": {"loss": "orpo"}})
    assert made.student_training.preference.sft_weight == 1.0
    preference = {"reference": "adapter-off"}  # teacher0 trains all its weights
    with pytest.raises(ValueError, match=r"teacher_training\.preference\.reference: .* teacher0 does not have"):
        tiny(tmp_path, teacher_training={"preference": preference})
    plan = build_plan(tiny(tmp_path, student_training={"preference": {"reference_model": str(make_base(tmp_path))}}))
    settings = plan.graph.stage("iter1-student-train").settings
    identity = fingerprint_model(tmp_path)
    assert settings["optim"]["reference_model"] == identity, "other weights under that name make it stale"
