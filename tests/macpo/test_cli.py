"""The command line as a user meets it: every command, and the exit codes of what goes wrong before a run."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from commands import macpo
from forks import forked
from tiny import tiny

from macpo.engine.recipe import dump

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(tiny(tmp_path / "run", iterations=1), comments=True))
    return path


def test_from_init_to_export(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("check", recipe, "--examples", 1) == 0
    said = capsys.readouterr().out
    assert "[PROMPT" in said and "[CHOSEN" in said and "USER:" in said and "</s>" in said

    assert macpo("plan", recipe) == 0
    said = capsys.readouterr().out
    assert "iter1-student-train" in said and "estimates" in said and "loads" in said

    assert macpo("status", recipe) == 0
    assert set(re.findall(r"^(\w+)", capsys.readouterr().out, re.M)) == {"pending"}

    assert macpo("run", recipe) == 0
    said = capsys.readouterr().out
    assert "student" in said and "report.html" in said

    assert macpo("status", tmp_path / "run") == 0
    assert set(re.findall(r"^(\w+)", capsys.readouterr().out, re.M)) == {"done"}
    assert macpo("status", recipe, "--set", "student_training.preference.beta=0.2") == 0
    said = capsys.readouterr().out
    assert re.search(r"^stale .*iter1-student-train .*beta: 0.1 -> 0.2", said, re.M)

    assert macpo("run", recipe, "--set", "student_training.preference.beta=0.2") == 2
    said = capsys.readouterr().err
    assert "beta" in said and "iter1-student-train" in said and "--rerun-stale" in said
    assert macpo("run", recipe, "--set", "student_training.preference.beta=0.2", "--rerun-stale") == 0
    capsys.readouterr()

    assert macpo("report", tmp_path / "run") == 0
    assert macpo("export", tmp_path / "run", "--out", tmp_path / "student") == 0
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_an_unfinished_run_has_status_and_report(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dying() -> None:
        os.environ["MACPO_KILL_AT"] = "stage-committed:12"
        macpo("run", recipe)

    assert forked(dying) == -signal.SIGKILL
    assert macpo("status", tmp_path / "run") == 0
    states = re.findall(r"^(\w+)", capsys.readouterr().out, re.M)
    assert states.count("done") == 12 and states.count("pending") == len(states) - 12
    assert macpo("report", tmp_path / "run") == 0
    assert "iter1-student-train" in (tmp_path / "run" / "report.html").read_text()


def test_init_writes_a_commented_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("init", tmp_path / "mine.yaml", "--like", "demo") == 0
    source = (RECIPES / "demo.yaml").read_text()
    assert (tmp_path / "mine.yaml").read_text() == source.replace("output: runs/demo", "output: runs/mine")
    assert macpo("init", tmp_path / "mine.yaml") == 2
    assert macpo("init", tmp_path / "other.yaml", "--like", "nothing") == 2
    assert "hh-local" in capsys.readouterr().err


def test_print_config_is_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("run", recipe, "--set", "seed=7", "--print-config") == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert macpo("run", again, "--print-config") == 0
    said = capsys.readouterr().out
    assert said == again.read_text() and "seed: 7" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("iteration=3", "did you mean 'iterations'"),  # fault 1
        ("iterations=-1", "iterations"),  # 2
        ("sampling.max_new_tokens=64", "context_tokens"),  # 4: no room for a prompt
        ("student.init.num_heads=3", "hidden_size"),  # 4
        ("use_teachers=[nobody]", "use_teachers"),  # 4
        ("ablations={x: {positives.sauce: own}}", "positives.sauce"),  # 1, inside an arm
        ("compute.dtype=float8", "dtype"),  # 2
        ("teachers.0.name=student", "distinct"),  # 4
        ("data.test_prompts=100", "test_prompts is for `path`"),  # 4: would be ignored
        ("student.data=pairs.jsonl", "student.data is not read"),
        ("teachers.0.data=pairs.jsonl", "teachers.data is for data.path"),
    ],
)
def test_wrong_settings_end_with_2_before_any_model(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert macpo("plan", recipe, "--set", override) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and "Fix: " in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "nowhere.yaml"), 2, "no recipe"),
        (("report", "nowhere"), 2, "no recipe"),
        (("demo", "--seeds", "5-3"), 2, "--seeds"),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str) -> None:
    assert macpo(*words) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--calibrate", ()), ("--k-orders", ("2",))])
def test_an_option_of_compare_that_nothing_would_read_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], option: str, value: tuple[str, ...]
) -> None:
    assert macpo("compare", recipe, option, *value) == 2
    assert f"error: {option}: it " in capsys.readouterr().err


def test_missing_data_and_models_hint_at_being_offline(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 5."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    assert macpo("run", recipe, "--set", "data={path: missing/file.jsonl}") == 2
    assert "missing/file.jsonl" in capsys.readouterr().err
    assert macpo("run", recipe, "--set", "student={model: nobody/no-such-model}") == 2
    said = capsys.readouterr().err
    assert "nobody/no-such-model" in said and "offline" in said


@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*.yaml")} - {"methods", "ablations"}))
def test_the_recipes_that_come_along_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "demo-ablations":
        assert macpo("demo", "--seeds", "1-2", "--print-config") == 0
        assert "own-positives" in capsys.readouterr().out
        return
    missing = {"hh-local": ("data.path=x", "teachers.0.model=y"), "small-models": ("data.path=x",)}
    missing |= {"hh-small": ("data.path=x", "teachers.0.data=y", "teachers.1.data=z")}
    needed = [word for one in missing.get(name, ()) for word in ("--set", one)]
    assert macpo("run", RECIPES / f"{name}.yaml", "--print-config", *needed) == 0


def test_sigterm_before_the_command_has_begun_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("macpo.arguments.parser", slow)
    assert macpo("status", "nowhere") == 75
    assert capsys.readouterr().err == "error: stopped by a signal. Fix: run the same command again.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
