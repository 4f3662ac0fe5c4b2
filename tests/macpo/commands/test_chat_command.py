"""`macpo chat`: policies of a finished run answer what is piped in, through the run's own template and sampling."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import macpo
from tiny import tiny

from macpo.commands.chat import Voice
from macpo.commands.export import Choice
from macpo.commands.policies.opening import policy_of_run
from macpo.config import Recipe
from macpo.engine.errors import DataError

QUESTION = "my name is emma and i want to repair the car ."


@pytest.fixture(scope="module")
def finished(tiny_run: Path) -> tuple[Path, Recipe]:
    return tiny_run, tiny(tiny_run, iterations=1)


def said(
    run_dir: Path, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    assert macpo("chat", run_dir, *words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_students_last_policy_responses_line_by_line(
    finished: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"{QUESTION}\n\nand the hedge ?\n/new\n{QUESTION}\n/quit\n{QUESTION}\n"
    first, second, again = said(finished[0], lines, monkeypatch, capsys)
    assert first == again and first != second and first.startswith("student@1: ")
    (other,) = said(finished[0], QUESTION, monkeypatch, capsys, "--seed", 9)
    assert other != first


def test_two_policies_response_beside_each_other(
    finished: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(finished[0], QUESTION, monkeypatch, capsys, "--agent", "teacher0", "--beside", "student@0")
    names = [line.partition(":")[0] for line in found]
    assert names == ["teacher0@1", "student@0"]
    alone = said(finished[0], QUESTION, monkeypatch, capsys, "--agent", "student", "--iteration", 0)
    assert alone == found[1:]
    (negative,) = said(finished[0], QUESTION, monkeypatch, capsys, "--policy", "negative")
    assert negative.startswith("student (negative): ")


def test_the_response_is_drawn_under_the_runs_template_and_sampling(finished: tuple[Path, Recipe]) -> None:
    """Greedy, it is what the model finds likeliest after the template's own prompt, token by token."""
    run_dir, recipe = finished
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"temperature": 0.0})})
    voice, policy = Voice(policy_of_run(run_dir, recipe, Choice())), policy_of_run(run_dir, recipe, Choice())
    response = voice.response(QUESTION)
    ids = policy.chat.prompt_ids([{"role": "user", "content": QUESTION}])
    text, model = [], policy.model
    while len(text) < recipe.sampling.max_new_tokens:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + text])).logits[0, -1].argmax())
        if token in policy.chat.stop_ids:
            break
        text.append(token)
    assert "USER: " in policy.chat.rendered(voice.messages[:1]) and response == policy.chat.text(text).strip()
    assert [message["role"] for message in voice.messages] == ["user", "assistant"]


def test_a_long_dialogue_loses_its_beginning_and_an_empty_room_is_an_error(finished: tuple[Path, Recipe]) -> None:
    run_dir, recipe = finished
    voice = Voice(policy_of_run(run_dir, recipe, Choice()))
    for _ in range(4):
        voice.response(QUESTION)  # together far more than the 52 tokens that a prompt has
    assert len(voice.messages) == 8
    voice.policy.reading = voice.policy.reading.model_copy(update={"max_prompt_tokens": 2})
    with pytest.raises(DataError, match="not even the end of the message fits"):
        voice.response(QUESTION)
    assert len(voice.messages) == 8


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (
            ("--agent", "nobody"),
            "error: --agent: no agent 'nobody' in this run. Fix: one of ceiling, student",
        ),
        (("--iteration", "7"), "error: --iteration: student has no iteration 7. Fix: use one of 0, 1, or -1"),
        (("--arm", "x"), "error: --arm: there is no arm 'x'"),
        (("--beside", "nobody@0"), "error: --beside: no agent 'nobody'"),
        (("--beside", "a b@c"), "error: --beside: got 'a b@c'. Fix: write a policy like student@0"),
    ],
)
def test_who_is_not_there(
    finished: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], wrong: str
) -> None:
    assert macpo("chat", finished[0], *words) == 2
    assert wrong in capsys.readouterr().err


def test_on_a_terminal_two_responses_stand_side_by_side(finished: tuple[Path, Recipe]) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "macpo", "chat", str(finished[0]), "--beside", "student@0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "dumb"}
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(ours, f"{QUESTION}\n/quit\n".encode())
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(timeout=120) == 0, shown.decode()
    os.close(ours)
    heads = [line for line in shown.decode().splitlines() if "student@1" in line and "student@0" in line]
    assert len(heads) == 2  # what chat begins with, and the head of the table
