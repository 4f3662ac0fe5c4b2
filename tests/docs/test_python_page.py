"""The blocks of docs/python.md, one after another in an empty folder; its table names what macpo offers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pages import named_blocks

import macpo

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "python.md").read_text()
BLOCKS = named_blocks("docs/python.md")
SAID = {
    "run": r"^$",
    "errors": r"iterations=-1: .*\n.*student_training\.preference\.betta=0\.2: .*beta",
    "frames": r"(?s)iteration +0 +1\n.*student.*teacher1.*prompt +response",
    "policies": r"student@0 .*\nstudent@0 .*\nstudent@1 .*\nstudent@1 ",
    "scores": r"(?s)perplexity +after\n.*True +\d",
    "models": r"-\d+\.\d+ \d+\n",
}


def test_the_blocks_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    assert list(BLOCKS) == ["run", "errors", "frames", "policies", "scores", "models"] and SAID.keys() == BLOCKS.keys()
    for name, block in BLOCKS.items():
        exec(block, space)
        said = capsys.readouterr().out
        assert re.search(SAID[name], said), f"{name}: {said}"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and space["run"].finished


def test_the_page_names_everything_that_macpo_offers() -> None:
    table = PAGE[: PAGE.index("## A run")]
    assert set(re.findall(r"`macpo\.(\w+)[`(]", table)) == {*macpo.__all__} - {"__version__"}
