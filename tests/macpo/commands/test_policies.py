"""Policies that are opened by `load_policy`: they write and score exactly as the stages of their run did."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from commands import macpo as command
from standalone_runs import unpack_runs

import macpo
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.model_cache import ModelCache

QUESTION = "how do i open the door number eight seven six ?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_runs(tmp_path_factory.mktemp("policies"))


@pytest.fixture(scope="module")
def student(runs: Path) -> macpo.Policy:
    return macpo.load_policy(runs / "macpo")


def test_it_writes_what_macpo_chat_writes(
    runs: Path, student: macpo.Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION))
    assert command("chat", runs / "macpo") == 0
    said = capsys.readouterr().out.strip()
    (output,) = student.generate(QUESTION)
    assert said == f"student@1: {(output.text or '').strip()}" and str(student) == "Policy('student@1')"
    assert student.generate([QUESTION, QUESTION])[1] != output, "the second time another response"
    assert student.generate([[{"role": "user", "content": QUESTION}]]) == [output]


def test_sampling_is_the_runs_unless_told_otherwise(student: macpo.Policy) -> None:
    (four,) = student.generate(QUESTION, n=4, seed=9, max_new_tokens=3)
    assert len(four.samples) == 4 and all(sample.num_tokens <= 3 for sample in four.samples)
    (longest,) = student.generate(QUESTION, max_new_tokens=10_000, ignore_eos=True, temperature=0.0)
    prompt = student.chat.prompt_ids([{"role": "user", "content": QUESTION}])
    assert longest.samples[0].num_tokens == student.reading.context_tokens - len(prompt)
    with pytest.raises(TypeError, match="temprature"):
        student.generate(QUESTION, temprature=0.0)
    with pytest.raises(ConfigError, match="top_p must be in"):
        student.generate(QUESTION, top_p=2.0)


def test_it_scores_what_the_run_scored(runs: Path) -> None:
    """The perplexity filter asked the student as it was before the iteration."""
    run = macpo.Run(runs / "macpo")
    found = run.candidates()[lambda each: each.arm == ""]
    scores = run.policy("student", 0).score(zip(found.messages, found.response, strict=True), finished=found.finished)
    assert len(scores) > 8
    assert [each.sum_logp for each in scores] == pytest.approx(found.sum_logp.tolist(), abs=1e-4)
    assert [each.perplexity for each in scores] == pytest.approx(found.perplexity.tolist(), rel=1e-4)


def test_a_prompt_that_is_too_long_loses_its_beginning_or_is_refused(student: macpo.Policy) -> None:
    long = [*[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "with care ."}] * 9]
    (output,) = student.generate([*long, {"role": "user", "content": QUESTION}])
    assert output.samples[0].num_tokens > 0
    plain = macpo.Policy.of(student.model, student.chat)
    with pytest.raises(DataError, match=r"the prompt has .* tokens, .* fit"):
        plain.generate(" ".join([QUESTION] * 99))


@pytest.mark.parametrize("merge", [False, True])
def test_an_exported_policy_is_the_same_policy(runs: Path, student: macpo.Policy, tmp_path: Path, merge: bool) -> None:
    assert command("export", runs / "macpo", "--out", tmp_path / "out", *["--merge"][: int(merge)]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists() is not merge
    opened = macpo.load_policy(tmp_path / "out", device="cpu", dtype="float32")
    pairs = [(QUESTION, "first look at the door ."), (QUESTION, "leave the door alone .")]
    ours, theirs = ([each.sum_logp for each in policy.score(pairs)] for policy in (student, opened))
    assert ours == pytest.approx(theirs, abs=1e-3) and ours[0] != pytest.approx(ours[1], abs=1e-2)


def test_agents_arms_and_kinds_of_policies(runs: Path) -> None:
    asked = {
        "teacher0@0": ("teacher0", 0, {}),
        "student (negative)": ("", None, {"policy": "negative"}),
        "own-positives.student@1": ("student", None, {"arm": "own-positives"}),
        "ceiling@0": ("ceiling", None, {}),
    }
    sums = {}
    for name, (agent, iteration, choice) in asked.items():
        policy = macpo.Run(runs / "macpo").policy(agent, iteration, **choice)
        assert policy.name == name
        (score,) = policy.score([(QUESTION, "leave the door alone .")])
        sums[name] = score.sum_logp
    assert len(set(sums.values())) == len(sums)
    assert macpo.load_policy(runs / "sft").name.startswith("policy@")


def test_score_takes_any_model_and_texts_or_ids(student: macpo.Policy) -> None:
    pairs = [
        (QUESTION, "leave the door alone ."),
        ("how do i mend the chair ?", "with care ."),
        (QUESTION, "with care ."),
    ]
    expected = macpo.score(student, pairs)
    assert macpo.score(student.model, pairs, tokenizer=student.chat) == expected
    ids = [
        (student.chat.prompt_ids(messages), student.chat.reply_ids(messages, response))
        for prompt, response in pairs
        for messages in [[{"role": "user", "content": prompt}]]
    ]
    assert macpo.score(student.model, ids) == expected
    cut = macpo.score(student, pairs, finished=[True, False, True])
    assert [each.num_tokens for each in cut] == [e.num_tokens - (i == 1) for i, e in enumerate(expected)]
    with pytest.raises(ConfigError, match="a text needs a tokenizer"):
        macpo.score(student.model, pairs)
    with pytest.raises(DataError, match="the response to a text is a text"):
        macpo.score(student, [(QUESTION, float("nan"))])  # type: ignore[list-item]
    with pytest.raises(DataError, match="has no token"):
        macpo.score(student, [(QUESTION, " ")])
    with pytest.raises(ValueError, match="2 values of finished for 3 pairs"):
        macpo.score(student, pairs, finished=[True, False])


def test_scores_are_those_of_the_whole_model(student: macpo.Policy) -> None:
    """Token by token, as the model's own logits say."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt, response = student.chat.prompt_ids(messages), student.chat.reply_ids(messages, "leave the door alone .")
    with torch.no_grad():
        logits = student.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)[range(len(response)), response].tolist()
    (score,) = student.score([(QUESTION, "leave the door alone .")])
    assert score.token_logps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "choice", "why"),
    [
        ("macpo", {"agent": "nobody"}, "error: agent: no agent 'nobody' in this run. Fix: one of ceiling, student"),
        ("macpo", {"iteration": 7}, "error: iteration: student has no iteration 7. Fix: use one of 0, 1"),
        ("macpo", {"arm": "x"}, "error: arm: there is no arm 'x'"),
        ("macpo", {"device": "tpu"}, "compute.device"),
        ("macpo/02-base-teacher0/model", {"agent": "teacher0"}, "is not the folder of a run, so it has no agents"),
        ("macpo/02-base-teacher0/model", {"dtype": "int8"}, "dtype"),
        ("macpo/01-data", {}, "holds no model.safetensors"),
        ("nowhere/at/all", {}, "there is no run, model or adapter folder"),
    ],
)
def test_what_cannot_be_opened(runs: Path, source: str, choice: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError) as error:
        macpo.load_policy(str(runs / source), **choice)  # type: ignore[arg-type]
    assert why in str(error.value)


def test_a_model_folder_is_opened_with_its_own_template(runs: Path) -> None:
    folder = runs / "macpo" / "02-base-teacher0" / "model"
    policy = macpo.load_policy(folder)
    assert "USER: " in policy.chat.rendered([{"role": "user", "content": QUESTION}])
    own = ModelCache().policy(PolicyRef(str(folder)))
    pair = [(QUESTION, "leave the door alone .")]
    assert policy.score(pair) == macpo.score(own, pair, tokenizer=policy.tokenizer)
