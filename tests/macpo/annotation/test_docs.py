"""Every command of docs/evaluation-annotate.md, in order, on a run that has what the page speaks of."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import macpo
from pages import blocks_for

from macpo.annotation.judgements import Session
from macpo.annotation.study import open_study
from macpo.engine.files import read_json, write_json

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "evaluation-annotate.md").read_text()


def test_every_command_works(
    responses: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    responses(tmp_path / "runs" / "mine", 80)
    monkeypatch.chdir(tmp_path)
    blocks = blocks_for("docs/evaluation-annotate.md", sh=5)["sh"]
    commands = [line for block in blocks for line in block.splitlines()]
    install, judge, report, label_studio, argilla, back = (shlex.split(command) for command in commands)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install == ["pip", "install", "macpo[eval]"] and {"krippendorff>=0.9"} <= set(extras["eval"])

    process = subprocess.Popen([sys.executable, "-m", "macpo.cli", *judge[1:]], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout and "http://127.0.0.1:" in process.stdout.readline()
        assert re.match(r"0 of \d+ judged by anna", process.stdout.readline())
        process.send_signal(signal.SIGINT)
    assert process.returncode == 75
    study = open_study(Path("runs/mine"))
    assert len(study.design.pairs) == 2 and study.design.gold_checks == 0.05
    with Session(study, "anna") as session:
        while showing := session.current:
            session.judge(showing, "left")

    for words in (report, label_studio, argilla):
        assert macpo(*words[1:]) == 0, capsys.readouterr().err
    tasks = read_json(tmp_path / "tasks.json")
    for task in tasks:
        result = [{"type": "pairwise", "value": {"selected": "right"}}]
        task["annotations"] = [{"completed_by": 1, "result": result, "was_cancelled": False}]
    write_json(tmp_path / back[-1], tasks)
    assert macpo(*back[1:]) == 0
    assert f"{len(tasks)} judgements as label-studio-1" in capsys.readouterr().out


def test_defaults_and_keys_are_as_the_page_says() -> None:
    page = (ROOT / "macpo" / "annotation" / "page.html").read_text()
    keys = dict(re.findall(r'aria-keyshortcuts="(\w)"[^>]*>(?:<kbd>\w</kbd>)?([^<]*)<', page))
    assert keys | {"c": ""} == {
        **{"1": "Response 1 is better", "2": "Response 2 is better", "0": "Equal", "b": "Both bad"},
        **{"s": "Skip", "u": "Undo", "c": ""},
    }
    assert all(f"`{key}`" in PAGE for key in keys)
