"""`macpo init`, `schema`, `env` and `completion`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import macpo

from macpo import bundled
from macpo.engine.recipe.tree import parse
from macpo.kernels.backend import IMPLEMENTED, explain, use_backend

FIRST_LINE = f"# yaml-language-server: $schema={bundled.SCHEMA}"


def plain(path: Path) -> Any:
    return parse(path.read_text(), str(path), []).plain()


def test_init_makes_the_folder_and_names_the_run_and_the_lines_to_fill_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert macpo("init", "new/folder/mine.yaml") == 0
    said = capsys.readouterr().out
    path = Path("new/folder/mine.yaml")
    lines = path.read_text().splitlines()
    assert "output: runs/mine" in lines and "recipes/hh-local.yaml" not in path.read_text()
    told = {int(number): field for number, field in re.findall(r"mine\.yaml:(\d+): ([\w.]+):", said)}
    assert list(told.values()) == ["data.path", "teachers.0.model"]
    for number, field in told.items():
        assert f"{field.rpartition('.')[2]}: null" in lines[number - 1]
    assert (path.parent / bundled.SCHEMA).is_file() and lines[0] == FIRST_LINE

    assert macpo("run", path, "--print-config") == 2
    wrong = capsys.readouterr().err
    assert [f"mine.yaml:{number}: {field}" in wrong for number, field in told.items()] == [True, True]


def test_init_into_a_folder_and_a_recipe_that_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("init", tmp_path / "experiments", "--like", "sft") == 0
    said = capsys.readouterr().out
    lines = (tmp_path / "experiments" / "sft.yaml").read_text().splitlines()
    for number, field in re.findall(r"sft\.yaml:(\d+): (\w+)$", said, re.MULTILINE):
        assert lines[int(number) - 1].startswith(f"{field}:")
    assert "runs as it is" in said and macpo("init", tmp_path / "experiments", "--like", "sft") == 2
    assert macpo("init", tmp_path / "my run: 1.yaml", "--like", "sft") == 0
    assert plain(tmp_path / "my run: 1.yaml")["output"] == "runs/my run: 1"


def test_init_lists_recipes_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("init", "--like", "list") == 0
    assert capsys.readouterr().out.split() == bundled.names()


@pytest.mark.parametrize("name", bundled.names())
def test_the_lines_marked_as_required_are_what_a_recipe_lacks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (bundled.folder() / f"{name}.yaml").read_text()
    path = tmp_path / "r.yaml"
    path.write_text(re.sub(r"null( +# required)", r"x\1", text))
    more = ["--set", "teachers.0.data=y", "--set", "teachers.1.data=z"] if name == "hh-small" else []
    assert macpo("run", path, "--print-config", *more) == 0
    path.write_text(text)
    assert macpo("run", path, "--print-config", *more) == (2 if "# required" in text else 0)


def test_the_schema_that_lies_beside_the_recipes_is_todays(capsys: pytest.CaptureFixture[str]) -> None:
    assert macpo("schema") == 0
    written = (bundled.folder() / bundled.SCHEMA).read_text()
    assert capsys.readouterr().out == written, f"macpo schema > recipes/{bundled.SCHEMA}"


def test_every_recipe_names_its_schema_and_holds_under_it() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((bundled.folder() / bundled.SCHEMA).read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    check = jsonschema.Draft7Validator(schema)
    for path in map(bundled.path_of, bundled.names()):
        assert path is not None and path.read_text().splitlines()[0] == FIRST_LINE, path
        assert [error.message for error in check.iter_errors(plain(path))] == [], path
    sft = plain(bundled.folder() / "sft.yaml")
    for wrong, said in (({"lr": 1}, "'lr' was unexpected"), ({"recipe": "dpo"}, "'dpo' is not one of")):
        assert any(said in error.message for error in check.iter_errors(sft | wrong))


def test_env_says_which_kernels_run_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert macpo("env") == 0
    said = capsys.readouterr().out
    for name in ("macpo", "python", "torch", "transformers", "cpu"):
        assert re.search(rf"^{name}: \S", said, re.MULTILINE)
    for operator in IMPLEMENTED:
        choice = explain(operator, "cpu")
        assert f"kernel {operator} on cpu: {choice.backend}: {choice.why}\n" in said
    assert "hf_secret" not in said
    with use_backend("torch"):
        assert macpo("env") == 0
    assert "kernel sample on cpu: torch: use_backend forces torch" in capsys.readouterr().out


def test_bash_completes_commands_options_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert macpo("completion", "zsh") == 0 and "compdef" in capsys.readouterr().out
    assert macpo("completion", "bash") == 0
    (tmp_path / "macpo.bash").write_text(capsys.readouterr().out)
    tried = """
source ./macpo.bash
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=(); _shtab_macpo; echo "${COMPREPLY[@]}"; }
try macpo ru; try macpo demo --se; try macpo run pref; try macpo run macpo.b; try macpo init --like hh-l
"""
    done = subprocess.run(["bash", "-c", tried], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["run", "--seed --seeds --set", "preference", "macpo.bash", "hh-local"]


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert macpo("completion", "bash") == 2
    assert "pip install 'macpo[completion]'" in capsys.readouterr().err
