"""What a run's folder says of the commands that ran it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from macpo.engine.errors import DataError, Stopped
from macpo.engine.run.attempts import ATTEMPTS, COMMAND, attempting, read_attempts, typed


def about() -> dict[str, object]:
    return {"command": "macpo run x", "device": "CPU", "versions": {"torch": "2"}, "flop": {"train": 1e12}}


def attempt(folder: Path, error: BaseException | None = None) -> None:
    with attempting(folder, about, print) as begin:
        begin()
        if error is not None:
            raise error


def test_each_attempt_is_noted_with_its_end(tmp_path: Path) -> None:
    attempt(tmp_path)
    with pytest.raises(Stopped):
        attempt(tmp_path, Stopped("stopped", "again"))
    with pytest.raises(DataError):
        attempt(tmp_path, DataError("bad", "mend it"))
    with attempting(tmp_path, about, print):  # was refused before it began
        pass
    found = read_attempts(tmp_path)
    assert [each.outcome for each in found] == ["finished", "stopped", "failed"]
    assert all(each.ended and each.ended >= each.began and each.seconds is not None for each in found)
    assert found[0].command == "macpo run x" and found[0].flop == {"train": 1e12}


def test_a_killed_attempt_stays_without_an_end(tmp_path: Path) -> None:
    with attempting(tmp_path, about, print) as begin:
        begin()
        killed = (tmp_path / ATTEMPTS).read_bytes()  # what is on disk meanwhile
    (tmp_path / ATTEMPTS).write_bytes(killed)
    attempt(tmp_path)
    assert [each.outcome for each in read_attempts(tmp_path)] == [None, "finished"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text('{"attempts": ['),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"attempts": [{"began": 5}]}'),
        lambda path: path.write_text('{"attempts": [{"began": "", "seconds": NaN}]}'),
        lambda path: path.mkdir(),
        os.mkfifo,
    ],
)
def test_a_damaged_file_costs_a_line(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path / ATTEMPTS)
    assert read_attempts(tmp_path) == [] and f"{ATTEMPTS} is ignored" in caplog.text
    attempt(tmp_path)
    assert json.loads((tmp_path / ATTEMPTS).read_text())["attempts"][0]["outcome"] == "finished"


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/macpo", "run", "my recipe.yaml", "--set", "seed=3"])
    assert typed() == "macpo run 'my recipe.yaml' --set seed=3"
    monkeypatch.setattr(sys, "argv", ["/lib/macpo/cli.py", "demo"])
    assert typed() == "macpo demo"
    monkeypatch.setenv(COMMAND, "macpo run x --ranks 2")  # in the processes that it starts
    assert typed() == "macpo run x --ranks 2"
