"""`macpo.run`: the command `macpo run` as a function, which leaves the notebook's process as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import macpo as command
from standalone_runs import COMPUTE, INIT, OPTIM, WORLD, content, recipe_of

import macpo
from macpo.engine.errors import ConfigError, ResourceError, Stopped
from macpo.engine.recipe import dump
from macpo.engine.run.run_progress import RunProgress
from macpo.engine.run.runner import Runner

SFT: dict[str, Any] = {
    "recipe": "sft",
    "data": {"world": WORLD},
    "context_tokens": 64,
    "training": OPTIM,
    "compute": COMPUTE,
    "template": "vicuna",
    "init": INIT,
}


def test_every_form_of_a_recipe_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = macpo.run(SFT, output=tmp_path / "run", seed=3)
    assert run.folder == tmp_path / "run" and run.finished and run.report.is_file()
    before = content(run.folder)
    capsys.readouterr()
    file = tmp_path / "mine.yaml"
    file.write_text(dump(recipe_of("sft", None, tmp_path / "run")))
    again = [
        macpo.run(file, set={"seed": 3}),
        macpo.run(run.folder),
        macpo.run({**SFT, "output": tmp_path / "run", "seed": np.int64(3)}),
    ]
    assert capsys.readouterr().err.count("are done already, nothing to do") == len(again)
    assert {each.folder for each in again} == {run.folder} and content(run.folder) == before
    assert command("run", file, "--seed", 3) == 0
    assert content(run.folder) == before


def test_a_recipe_that_comes_along_runs_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("context_tokens", "training", "compute", "template", "init", "data")
    given = {name: SFT[name] for name in names}
    run = macpo.run("sft", set={"model": None, **given, "training.batch": 16, "sampling": None})
    assert run.folder == tmp_path / "runs" / "sft"
    assert len(run.steps()[lambda each: each.stage == "train-policy"]) == 2


@pytest.mark.parametrize(
    ("recipe", "given", "why"),
    [
        (SFT, {"set": {"trainin.beta": 1}}, "trainin: unknown key. Fix: did you mean 'training'"),
        ({**SFT, "contxt_tokens": 64}, {}, "error: recipe: contxt_tokens"),
        ({**SFT, "recipe": "dpo"}, {}, "error: recipe: recipe: got 'dpo'"),
        (SFT, {"seed": 1, "set": {"seed": 2}}, "error: seed is given twice"),
        (SFT, {"set": {"template": object()}}, "error: template: got"),
        ("nowhere.yaml", {}, "there is no recipe 'nowhere.yaml'"),
    ],
)
def test_what_is_wrong_is_raised_as_on_the_command_line(
    recipe: Any, given: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        macpo.run(recipe, output=tmp_path / "run", **given)
    assert why in str(error.value) and not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "run", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ResourceError):
        macpo.run(SFT, output=tmp_path / "run")


def test_the_stop_button_stops_it_and_the_same_call_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's stop button is Ctrl-C; handlers, threads and environment are afterwards what they were."""
    torch.set_num_threads(2)
    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)  # which a command of the same process has set
    begin, pressed = RunProgress.begin, []

    def press(self: RunProgress, name: str, process: int = 0) -> None:
        begin(self, name, process)
        if name == "train-policy" and not pressed:
            pressed.append(name)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunProgress, "begin", press)
    with pytest.raises(Stopped, match="run the same command again"):
        macpo.run(SFT, output=tmp_path / "stopped")
    left = macpo.Run(tmp_path / "stopped")
    assert pressed and not left.finished and "not finished" in repr(left) and len(left.stages()) > 0
    for number, handler in own.items():
        assert signal.getsignal(number) is handler
    assert torch.get_num_threads() == 2 and os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ
    assert macpo.run(SFT, output=tmp_path / "stopped").finished
    macpo.run(SFT, output=tmp_path / "whole")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_it_runs_in_a_thread_beside_a_notebooks_own(tmp_path: Path) -> None:
    found: list[macpo.Run] = []
    thread = threading.Thread(target=lambda: found.append(macpo.run(SFT, output=tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].finished


def test_stages_side_by_side_need_no_main_module_and_no_arguments(tmp_path: Path) -> None:
    """As in a kernel: the program comes through a pipe, and workers must not try to run it again."""
    recipe = {**SFT, "compute": {**COMPUTE, "jobs": 2}, "output": str(tmp_path / "run")}
    program = f"import sys, macpo\ndel sys.argv[:]\nprint(macpo.run({json.dumps(recipe)!s}).finished)"
    done = subprocess.run([sys.executable, "-"], input=program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
