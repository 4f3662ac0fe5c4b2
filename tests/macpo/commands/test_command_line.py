"""What the command line takes and what it refuses: nothing is abbreviated, and nothing is accepted and ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import macpo
from tiny import tiny

from macpo import bundled
from macpo.arguments import Parser, parse, parser
from macpo.engine.recipe import dump
from macpo.engine.train import parse as torchrun_parse


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert macpo(*words, "--print-config") == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo --see 3", "unknown option --see. Fix: did you mean --seed."),
        ("demo --rerun", "unknown option --rerun. Fix: did you mean --rerun-stale."),
        ("run demo extra", "unknown word extra."),
        ("rnu demo", "COMMAND: got 'rnu'. Fix: did you mean run."),
        ("", "the following arguments are required: COMMAND."),
        ("run demo --ranks 0", "--ranks: got '0', which is no whole number from 1."),
        ("check demo --examples -1", "--examples"),
        ("chat runs/x --iteration last", "--iteration: no whole number: 'last'."),
        ("completion fish", "shell: got 'fish'. Fix: use bash, zsh."),
        ("init", "no file to write. Fix: macpo init mine.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_its_remedy(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert macpo(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: macpo") and said in error and error.count("\n") == 1 and " Fix: " in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo --seed 1 --seeds 1-2", "--seeds: not allowed with argument --seed"),
        ("demo --seed 1 --set seed=2", "--set seed does not go with --seed"),
        ("demo --seeds 1-2 --set seed=2", "--set seed does not go with --seeds"),
        ("demo --seeds 1-2 --set output=x", "--set output does not go with --seeds"),
        ("demo --out x --set output=y", "--set output does not go with --out"),
        ("compare demo --seeds 1-2 --set seed=2", "--set seed does not go with --seeds"),
        ("compare demo --plan --rerun-stale", "--rerun-stale does not go with --plan"),
        ("run demo --from x --print-config", "--from does not go with --print-config"),
        ("run demo --ranks 2 --print-config", "--ranks does not go with --print-config"),
        ("plan demo --gpu h100 --print-config", "--gpu does not go with --print-config"),
        ("check demo --examples 9 --print-config", "--examples does not go with --print-config"),
        ("export x --out y --policy negative --iteration 1", "--iteration does not go with --policy negative"),
        ("chat x --policy negative --iteration 1", "--iteration does not go with --policy negative"),
        ("evaluate x --judge j --validate --policy student@0", "--policy does not go with --validate"),
        ("init x.yaml --like list", "--like list writes no file"),
    ],
)
def test_an_option_that_another_would_make_ignored_is_refused(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert macpo(*words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [("demo",), ("run",)])
def test_from_holds_for_every_one_of_several_seeds(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump(tiny(tmp_path / "run", iterations=0)))
    where = (recipe,) if words == ("run",) else ("--out", tmp_path / "seeds")
    assert macpo(*words, *where, "--seeds", "1-2", "--from", "no-such-stage") == 2
    assert "no-such-stage" in capsys.readouterr().err


def test_a_seed_of_its_own_reaches_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    demo = printed(capsys, "demo", "--seed", 3)
    assert "seed: 3" in demo and any(line.endswith('runs/demo-seed-3"') for line in demo if line.startswith("output:"))
    assert "seed: 4" in printed(capsys, "run", "preference", "--seed", 4)
    assert "seed: 5" in printed(capsys, "compare", "demo", "--methods", "spin", "--set", "seed=5")


def test_every_option_is_explained_and_none_is_abbreviated() -> None:
    root = parser()
    commands = next(action.choices for action in root._actions if action.dest == "==SUPPRESS==" or action.choices)
    assert len(commands) > 12
    for name, command in commands.items():
        assert isinstance(command, Parser) and command.allow_abbrev is False
        for action in command._actions:
            assert action.help or action.choices, f"macpo {name}: {action.dest} has no help"
    with pytest.raises(SystemExit):
        torchrun_parse(["x.yaml", "--rerun"])


def test_a_recipe_that_comes_along_is_named_alone_and_a_file_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["run", "preference"]).recipe == bundled.path_of("preference")
    assert "recipe: sft" in printed(capsys, "run", "sft")
    assert macpo("run", "preferences") == 2
    assert "preference, reward, sft" in capsys.readouterr().err
    (tmp_path / "preference").mkdir()
    assert parse(["run", "preference"]).recipe == Path("preference")


def test_python_m_macpo_is_macpo() -> None:
    done = subprocess.run([sys.executable, "-m", "macpo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("macpo 0.")
