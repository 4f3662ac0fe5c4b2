"""`macpo evaluate` on a run's folder: judges by name, opponents by name, validation, estimate, kill and resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from architectures import save_byte_model
from commands import macpo
from fake_server import Reply, Server, completion
from forks import ranks, start, wait
from pages import blocks_for
from tiny import make_run, tiny

from macpo.commands.evaluate import Wishes, evaluate
from macpo.engine.errors import ConfigError
from macpo.engine.files import read_json, read_jsonl, write_json, write_jsonl
from macpo.engine.recipe import dump
from macpo.engine.run.folder import folder_of
from macpo.report.judged import judged
from macpo.report.policy_names import last_student, named, policy_name, usual_opponents
from macpo.report.run_reader import RunReader

KEY = "sk-canary-51d0c2"


def rule(number: int, question: str) -> Reply:
    """Prefers the reply that promises a step; both or neither is a tie."""
    text = question.split("<reply_A>")[1]
    first, second = ("check step" in part for part in text.split("<reply_B>"))
    said = "[[C]]" if first == second else "[[A]]" if first else "[[B]]"
    return completion(f"Because. {said}", usage={"prompt_tokens": 50, "completion_tokens": 5}, model="rule-1.0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("judging") / "run", num_test=10)
    for file in [*run.glob("*/metrics.jsonl"), *run.glob("*/scores.jsonl")]:  # drawn by the report, read by no judge
        shutil.rmtree(file.parent)
    pairs = [
        {"prompt_id": f"{i:016x}", "prompt": [{"role": "user", "content": f"question {i}"}], "chosen_by": "human",
         "rejected_by": "human", "chosen_finished": True, "rejected_finished": True, "ref_chosen_logp": None,
         "chosen": f"first check step {i}" if i % 4 else "no", "rejected": "go away" if i % 4 else "check step 0"}
        for i in range(12)
    ]  # fmt: skip
    write_jsonl(folder_of(run, "data") / "test.jsonl", pairs)
    development = {"teacher0": {"gold": 0.5}, "teacher1": {"gold": 0.7}, "teacher2": {"gold": 0.6}}
    write_json(run / "summary.json", read_json(run / "summary.json") | {"development": development})
    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server(rule, read=lambda body: body["messages"][0]["content"]) as server:
        yield server


@pytest.fixture
def run(made: Path, tmp_path: Path, server: Server) -> Path:
    """The run with a judge `rule` in its recipe."""
    shutil.copytree(made, tmp_path / "run")
    write_recipe(tmp_path / "run", server)
    return tmp_path / "run"


def write_recipe(run: Path, server: Server, opponents: tuple[str, ...] = (), **judge: Any) -> None:
    judges = [{"name": "rule", "base_url": server.url, "model": "rule", "api_key_env": "JUDGE_KEY", **judge}]
    changes: dict[str, Any] = {"evaluation": {"judges": judges, "opponents": opponents}}
    (run / "recipe.yaml").write_text(dump(tiny(run, **changes)))


def result(run: Path, name: str = "rule") -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / "judging" / name / "judging.json")
    return found


def expected(run: Path, policy: str, opponent: str) -> list[int]:
    """Wins, ties and losses by the rule, from the responses alone."""
    texts = [
        {row["prompt_id"]: "check step" in row["answer"] for row in named(RunReader(run), name).rows()}
        for name in (policy, opponent)
    ]
    signs = [texts[0][key] - texts[1][key] for key in texts[0]]
    return [signs.count(sign) for sign in (1, 0, -1)]


def test_every_block_of_the_page(
    run: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's recipe, file of judges and commands, in order, in a folder that holds what the page speaks of."""
    blocks = blocks_for("docs/evaluation-judge.md", sh=1, yaml=2)
    (commands,), (recipe, file) = blocks["sh"], blocks["yaml"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run = run.rename(tmp_path / "runs" / "mine")
    changes = yaml.safe_load(recipe.replace("https://host/v1", server.url))
    (run / "recipe.yaml").write_text(dump(tiny(run, **changes)))
    (tmp_path / "judges.yaml").write_text(file)
    save_byte_model(tmp_path / "models" / "judge")
    before = {path: path.read_bytes() for path in run.glob("[0-9]*/*")}
    plan, validate, usual, chosen, local = (line.split()[1:] for line in commands.splitlines())

    assert macpo(*plan) == 0
    out = capsys.readouterr().out
    questions = int(re.search(r"(\d+) questions to ask, 0 answered", out)[1])  # type: ignore[index]
    counts = re.search(r"([\d,]+) tokens in .*at most ([\d,]+) out", out)
    sent, back = (int(each.replace(",", "")) for each in counts.groups())  # type: ignore[union-attr]
    assert not server.asked and not (run / "judging").exists()
    assert back == questions * 512 and f"at most {(sent * 2.5 + back * 10) / 1e6:,.2f} " in out

    assert macpo(*validate) == 0
    out = capsys.readouterr().out
    # nine of twelve pairs agree with the rule: 0.75, and Cohen's kappa 2 x 0.75 - 1
    assert "on 12 human pairs: accuracy 0.750" in out and "kappa 0.500" in out and "told from guessing" in out
    assert len(server.asked) == 24
    server.asked.clear()

    assert macpo(*usual) == 0
    out, err = capsys.readouterr()
    assert len(server.asked) == questions and f"{questions} questions to ask, 0 answered already" in err
    assert sum(map(len, server.asked)) / 4 <= sent <= sum(map(len, server.asked)) / 4 + questions
    assert "on 12 human pairs: accuracy 0.750" in out and out.count("student@3  ") == 3
    found = result(run, "gpt")["results"]
    assert [row["opponent"] for row in found] == ["student@0", "teacher1@0", "ceiling@0"]
    for row in found:
        assert [row["win"], row["tie"], row["lose"]] == expected(run, "student", row["opponent"])
        assert row["policy"] == "student@3" and row["failed"] == 0
        assert row["models"] == ["rule-1.0"] * (row["equal"] < 10)
        assert row["win_rate"]["low"] <= row["win_rate"]["value"] <= row["win_rate"]["high"]
    rows = [row for _, row in read_jsonl(run / "judging" / "gpt" / "student@3-vs-teacher1@0.jsonl")]
    assert len(rows) == 20 and {row["first"] for row in rows} == {"student@3", "teacher1@0"}

    assert macpo(*chosen) == 0  # beside what was found before
    assert [row["prompts"] for row in result(run, "gpt")["results"]] == [10, 10, 10, 5, 5]
    assert macpo(*local) == 0
    (row,) = result(run, "local")["results"]
    assert row["judged"] == 2 and row["failed"] == 0
    page = (run / "report.html").read_text()
    assert 'id="judging"' in page and "accuracy 0.750" in page and "not validated" in page and "log-probs" in page
    assert {path: path.read_bytes() for path in run.glob("[0-9]*/*")} == before  # no stage was touched
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_usual_opponents(run: Path) -> None:
    reader = RunReader(run)
    found = [policy_name(each) for each in usual_opponents(reader, last_student(reader))]
    assert found == ["student@0", "teacher0@3", "teacher1@3", "teacher2@3", "ceiling@0"]
    assert "ceiling@0" not in map(policy_name, usual_opponents(reader, named(reader, "ceiling")))


def test_two_ranks_share_a_local_judge(run: Path, tmp_path: Path) -> None:
    save_byte_model(tmp_path / "judge")
    judges = [{"name": "local", "mode": "logprob", "model": str(tmp_path / "judge"), "limit": 3}]
    (run / "recipe.yaml").write_text(dump(tiny(run, evaluation={"judges": judges})))
    wishes = Wishes(str(run), "local", opponents=("teacher1@0",), ranks=2)
    assert ranks(2, lambda world: evaluate(wishes, world)) == [0, 0]
    (row,) = result(run, "local")["results"]
    keys = [row["key"] for _, row in read_jsonl(run / "judging" / "local" / "replies.jsonl")]
    assert row["judged"] == 3 and len(set(keys)) == len(keys) == 2 * (3 - row["equal"])


def test_killed_and_run_again_nothing_is_asked_twice(run: Path, server: Server) -> None:
    """SIGKILL while questions are open: those whose replies are on disk are not asked again."""

    def slow(number: int, question: str) -> Reply:
        time.sleep(0.02)
        return rule(number, question)

    server.act = slow
    write_recipe(run, server, workers=1)
    pid = start(lambda: macpo("evaluate", run, "--judge", "rule", "--opponents", "teacher1@0"))
    limit = time.monotonic() + 60
    while len(server.asked) < 5 and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    kept = [json.loads(line)["key"] for line in whole_lines(run / "judging" / "rule" / "replies.jsonl")]
    asked = list(server.asked)
    assert 0 < len(kept) <= len(asked) <= len(kept) + 1
    assert macpo("evaluate", run, "--judge", "rule", "--opponents", "teacher1@0") == 0
    again = server.asked[len(asked) :]
    assert not set(asked[: len(kept)]) & set(again) and len(set(again)) == len(again)
    (row,) = result(run)["results"]
    assert [row["win"], row["tie"], row["lose"]] == expected(run, "student", "teacher1@0")


def whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].splitlines()


def test_what_cannot_be_done_is_said_in_a_line(
    run: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, said in (
        (("--judge", "other"), "there is no judge 'other'. Fix: use one of rule"),
        (("--judge", "rule", "--opponents", "student@9"), "there is no evaluated policy 'student@9'"),
        (("--judge", "rule", "--policy", "nobody"), "use one of ceiling@0, "),
        (("--judge", "rule", "--opponents", "student"), "nobody to be compared with"),
        (("--judge", "rule", "--ranks", "2"), "raise its `workers` instead"),
        (("--judge", "rule", "--plan", "--price-in", "2"), "give both"),
        (("--judge", "rule", "--validate", "--policy", "student@0"), "--policy does not go with --validate"),
    ):
        assert macpo("evaluate", run, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line
    server.act = lambda number, question: (401, {}, b"")
    assert macpo("evaluate", run, "--judge", "rule") == 2
    assert "refuses the key (HTTP 401). Fix: check JUDGE_KEY" in capsys.readouterr().err
    server.act = lambda number, question: completion("Both are lovely.")
    write_recipe(run, server, max_failure_rate=0.0, workers=1)
    monkeypatch.setattr("macpo.judging.judge.Retries.wait_s", lambda *_: 0.0)
    assert macpo("evaluate", run, "--judge", "rule") == 7
    assert "the judge failed on 1 of the first" in capsys.readouterr().err
    monkeypatch.delenv("JUDGE_KEY")
    assert macpo("evaluate", run, "--judge", "rule") == 2
    assert "JUDGE_KEY is not set" in capsys.readouterr().err


def test_names_of_policies(run: Path) -> None:
    reader = RunReader(run)
    for name, full in {
        "student": "student@3", "student@0": "student@0", "ceiling": "ceiling@0", "teacher-best": "teacher1@3",
        "teacher-best@0": "teacher1@0", "one-teacher.student": "one-teacher.student@3",
    }.items():  # fmt: skip
        assert policy_name(named(reader, name)) == full
    scores = {name: agent["scores"][0]["gold"] for name, agent in reader.summary["agents"].items()}
    assert max((n for n in scores if n.startswith("teacher")), key=scores.__getitem__) == "teacher2", "not by test"
    write_json(run / "summary.json", {k: v for k, v in reader.summary.items() if k != "development"})
    with pytest.raises(ConfigError, match=r"teacher-best is chosen on development prompts.*data\.dev_prompts"):
        named(RunReader(run), "teacher-best@0")
    for name in ("student@4", "", "@0", "one-teacher.ceiling", "a.b.c", "student@-1"):
        with pytest.raises(ConfigError):
            named(reader, name)


def test_the_report_says_what_is_stale_and_survives_a_spoilt_file(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert macpo("evaluate", run, "--judge", "rule", "--opponents", "student@0,ceiling") == 0
    path = named(RunReader(run), "ceiling").folder.path / "evaluation.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    (shown,) = judged(RunReader(run))
    assert [note.partition(":")[0] for note in shown.notes] == ["student@3 against ceiling@0"]
    assert "have changed since" in shown.notes[0]
    (run / "judging" / "rule" / "judging.json").write_text('{"judge": {}, "results": 3}')
    assert judged(RunReader(run)) == [] and "is ignored" in caplog.text
