"""A teacher that a server answers for: what a recipe may say of it, and a whole run with one."""

from __future__ import annotations

import json
import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from commands import macpo
from fake_server import Reply, Server, completion
from pages import blocks_for
from tiny import init, tiny

from macpo.commands.check import check
from macpo.commands.planning.estimates import estimate
from macpo.commands.preflight import preflight
from macpo.commands.run import runner_of
from macpo.config import Recipe
from macpo.engine.config import ServedSettings
from macpo.engine.errors import ConfigError
from macpo.engine.files import read_json, read_jsonl
from macpo.engine.generation import Request, SamplingParams, ServedGenerator
from macpo.engine.recipe import dump, loads
from macpo.engine.run.folder import folder_of
from macpo.methods.registry import build_plan
from macpo.recipe_kinds import plan_of

KEY = "sk-canary-90b1e4"
PAGE = (Path(__file__).parents[2] / "docs" / "served.md").read_text()
SERVED = {
    "base_url": "http://127.0.0.1:8000/v1",
    "server": "vllm",
    "api": "chat",
    "positive": "good",
    "negative": "bad",
}


def recipe(output: Path, served: dict[str, Any], **changes: Any) -> Recipe:
    """A teacher made here, and one behind the server."""
    own = {"init": init(16), "tuning": {"type": "full"}}
    teachers = [own, {"train": False, "served": SERVED | served}]
    return tiny(output, **{"teachers": teachers, "iterations": 1, "evaluation": {"ceiling": False}} | changes)


def reply(number: int, body: dict[str, Any]) -> Reply:
    """The served teacher: what it says tells which policy was asked."""
    return completion(f"thanks , {body['model']} {len(body['messages'][-1]['content'])} .")


def test_a_run_with_a_served_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server goes while the run is under way: one line, exit code 7; the same command goes on from there."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    run_dir = tmp_path / "run"
    with Server(lambda number, body: reply(number, body) if number <= 12 else (404, {}, b"gone")) as server:
        made = recipe(run_dir, {"base_url": server.url, "api_key_env": "TEACHER_KEY", "concurrency": 1})
        (tmp_path / "recipe.yaml").write_text(dump(made))
        assert macpo("run", str(tmp_path / "recipe.yaml")) == 7
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: served: ") and server.url in line for line in lines) == 1
        assert not any("Traceback" in line for line in lines)
        asked_before = [body["messages"] for body in server.asked[:8]]  # one wave of eight was kept
        server.asked.clear()
        server.act = reply
        assert macpo("run", str(tmp_path / "recipe.yaml")) == 0
        asked = [body["messages"] for body in server.asked if body["model"] == "good"]
        assert len(asked) == 20 - 8 + 12  # what was left of the student half, and the test prompts once
        assert not [messages for messages in asked_before if messages in asked]
        assert sum(body["model"] == "bad" for body in server.asked) == 20
        server.asked.clear()
        assert macpo("run", str(tmp_path / "recipe.yaml")) == 0 and not server.asked
    with Server(reply) as moved:  # at another address, with the same weights: nothing is stale
        elsewhere = recipe(run_dir, {"base_url": moved.url, "api_key_env": "TEACHER_KEY"})
        assert {row.state for row in runner_of(elsewhere, plan_of(elsewhere)).status()} == {"done"}
    others = recipe(run_dir, {"base_url": server.url, "positive": "better"})
    stale = {row.name: row.why for row in runner_of(others, plan_of(others)).status() if row.state == "stale"}
    assert "good" in stale["init-teacher1-answer"] and "init-teacher1-bad-answer" not in stale

    responses = [row for _, row in read_jsonl(folder_of(run_dir, "init-teacher1-answer") / "responses.jsonl")]
    assert len(responses) == 20 and all(row["text"].startswith("thanks , good ") for row in responses)
    candidates = [row for _, row in read_jsonl(folder_of(run_dir, "iter1-student-score") / "candidates.jsonl")]
    assert {c["by"] for row in candidates for c in row["candidates"]} == {"teacher0", "teacher1"}
    assert all(c["sum_logp"] < 0 for row in candidates for c in row["candidates"])  # the student's, of the text
    agents = read_json(run_dir / "summary.json")["agents"]
    first, last = agents["teacher1"]["scores"]
    assert first | {"iteration": 1} == last and "gold" in last and "preference_accuracy" not in last
    assert "preference_accuracy" in agents["teacher0"]["scores"][0]
    assert "served by vllm" in (run_dir / "report.html").read_text()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert texts and not any(KEY.encode() in text for text in texts)
    capsys.readouterr()
    assert macpo("export", str(run_dir), "--agent", "teacher1", "--out", str(tmp_path / "out")) == 2
    assert "teacher1 is served" in capsys.readouterr().err


def test_check_and_plan_know_it(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", {})
    text = "\n".join(check(made))
    assert "teacher1: good, served by vllm, under the server's own template" in text
    rows = {row.stage: row for row in estimate(made, build_plan(made))}
    assert rows["init-teacher1-answer"].seconds == 0 < rows["init-teacher0-answer"].seconds
    assert rows["init-teacher1-answer"].disk_bytes > 0 and not rows["init-teacher1-answer"].load
    assert [name for name in rows if "teacher1" in name] == [
        "init-teacher1-answer", "init-teacher1-bad-answer", "eval-teacher1-iter0",
    ]  # fmt: skip


def test_arguments_that_do_not_reach_a_servers_template_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", {}).model_copy(update={"template_arguments": {"enable_thinking": False}})
    with pytest.raises(ConfigError) as caught:
        preflight(made, build_plan(made))
    said = next(problem for problem in caught.value.problems if "uses its own template" in problem.message)
    assert said.field == "teachers.1.template_arguments" and "template_arguments: {}" in said.fix


def test_with_weights_here_too_the_pairs_are_scored(tmp_path: Path) -> None:
    teacher = {"name": "t", "model": "a/base", "positive": "a/ready", "train": False, "served": SERVED}
    made = recipe(tmp_path, {}, teachers=[teacher])
    stages = {stage.name: stage for stage in build_plan(made).graph.stages}
    assert "base_logps" in stages["eval-t-iter0"].inputs and stages["eval-t-iter0"].settings["ready"] == "hub:a/ready"
    assert "ready" not in stages["init-t-answer"].settings and "127.0.0.1" not in json.dumps(
        dict(stages["init-t-answer"].settings)
    )


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("served", {"base_url": "127.0.0.1:8000"}, "served.base_url is no http(s) URL: '127.0.0.1:8000'"),
        ("served", {"base_url": "http://me:secret@127.0.0.1/v1"}, "served.base_url holds a password"),
        ("served", {"base_url": "http://far.example/v1", "api_key_env": "K"}, "unencrypted over http"),
        ("served", {"server": "vlm"}, "Fix: did you mean 'vllm'"),
        ("served", {"concurrency": 0}, "served.concurrency: got 0"),
        ("served", {"api_key": "sk-1"}, "served.api_key: unknown key"),
        ("served", {"api": "completions"}, "model is missing"),
        ("agent", {"train": True}, "teachers.0.train must be false"),
        ("agent", {"negative": "folder"}, "teachers.0.negative is not read"),
        ("agent", {"init": {"hidden_size": 16}}, "teachers.0.init is not read"),
        ("agent", {"data": "pairs.jsonl"}, "teachers.0.data is not read"),
        ("agent", {"template": "vicuna"}, "teachers.0.template is not read"),
    ],
)
def test_what_a_recipe_cannot_say(where: str, change: dict[str, Any], said: str) -> None:
    agent: dict[str, Any] = {"train": False, "served": dict(SERVED)}
    (agent["served"] if where == "served" else agent).update(change)
    text = json.dumps({"data": {"path": "x"}, "teachers": [agent], "student": {"model": "m"}})
    with pytest.raises(ConfigError) as caught:
        loads(text, Recipe, file="r.yaml")
    assert said in str(caught.value) and "secret" not in str(caught.value), str(caught.value)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].field.startswith("teachers.0")


def test_only_teachers_can_be_served() -> None:
    tree = {"data": {"path": "x"}, "teachers": [{"model": "m"}], "student": {"train": False, "served": SERVED}}
    with pytest.raises(ConfigError, match=r"student\.served is for teachers alone"):
        loads(json.dumps(tree), Recipe)


def test_the_page_says_what_works() -> None:
    """Its recipes are taken, its table names the kinds of servers, its extra is there, its Python runs."""
    blocks = blocks_for("docs/served.md", sh=1, yaml=2, python=1)
    first, second = blocks["yaml"]
    rest = "\ndata: {path: x}\nstudent: {model: m}\n"
    (big,) = loads(first + rest, Recipe).teachers
    assert big.has_tokenizer and not big.has_weights and big.served is not None and big.served.api == "completions"
    hosted = loads(second + rest, Recipe)
    generator = ServedGenerator(hosted.teachers[0].served, "m")  # type: ignore[arg-type]
    generator.check(
        [Request("p", (), SamplingParams.of(hosted.sampling), messages=({"role": "user", "content": "x"},))]
    )
    kinds = ServedSettings.model_fields["server"].annotation.__args__  # type: ignore[union-attr]
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(kinds)
    assert blocks["sh"] == ["pip install 'macpo[served]'\n"]
    assert "served" in metadata("macpo").get_all("Provides-Extra")
    with Server(lambda number, body: completion("fine")) as server:
        names: dict[str, Any] = {"url": server.url, "tokenizer": None, "prompts": [[4, 5]]}
        exec(blocks["python"][0], names)
    assert [sample.text for sample in names["outputs"][0].samples] == ["fine"] * 4
