"""The Dockerfile, as far as it can be read without Docker; `.ci/image` builds it, or runs its steps without Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import dockerfile
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "Dockerfile").read_text()
STEPS = dockerfile.steps(SOURCE)


def of(word: str, stage: str | None = None) -> list[str]:
    return [step.text for step in STEPS if step.word == word and stage in (None, step.stage)]


def test_stages_stand_on_images_or_on_stages_above_them() -> None:
    names: list[str] = []
    for text in of("FROM"):
        base, _, name = text.partition(" AS ")
        assert base == "python:${PYTHON}-slim" or base in names
        names.append(name)
    assert names == ["wheel", "cpu", "cuda"]
    assert {text.split()[0].removeprefix("--from=") for text in of("COPY") if "--from=" in text} <= set(names)


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_ends_as_a_user_without_rights(stage: str) -> None:
    assert of("USER", stage)[-1] == "macpo"


def test_the_entry_point_is_the_command() -> None:
    assert [json.loads(text) for text in of("ENTRYPOINT")] == [["macpo"]]
    assert [json.loads(text) for text in of("CMD")] == [["--help"]]


def test_files_that_are_copied_exist_and_variables_are_declared() -> None:
    copied = [text.split()[0] for text in of("COPY") if not text.startswith("--")]
    assert copied == [".", "constraints.txt"] and all((ROOT / name).exists() for name in copied)
    used = set(re.findall(r"\$\{(\w+)", " ".join([*of("RUN"), *of("FROM")])))
    assert used == {text.partition("=")[0] for text in of("ARG")}


def test_the_image_has_the_python_of_this_package() -> None:
    (least,) = re.findall(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text())
    (python,) = (text.partition("=")[2] for text in of("ARG") if text.startswith("PYTHON="))
    assert [int(part) for part in python.split(".")] >= [int(part) for part in least.split(".")]


def test_the_context_leaves_out_what_git_ignores() -> None:
    left_out = (ROOT / ".dockerignore").read_text()
    for line in (ROOT / ".gitignore").read_text().split():
        assert line.strip("/*").replace(".so", "") in left_out or "_cache" in line


def test_a_line_that_is_no_instruction_is_seen() -> None:
    with pytest.raises(ValueError, match="not an instruction: RUNN x"):
        dockerfile.steps("FROM a AS b\nRUNN x")
