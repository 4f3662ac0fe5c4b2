"""Every setting of the data block holds for every file; no test prompt is trained on; all rows are checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from standalone_runs import COMPUTE, INIT, OPTIM
from tiny import tiny

from macpo.agent_settings import AgentSettings
from macpo.commands.check import check
from macpo.commands.planning.estimates import size_of
from macpo.data.prompts import Prompts
from macpo.data.spool import Spool, spooled, whole
from macpo.data_settings import DataSettings
from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.errors import ConfigError, DataError, MacpoError
from macpo.engine.files import read_json, read_jsonl
from macpo.method.prompt_sets import read_sources
from macpo.methods.registry import build_plan as method_plan
from macpo.recipe_kinds import KINDS
from macpo.standalone.config import ExampleData, PairData
from macpo.standalone.graph import build_plan
from macpo.standalone.records import Sets, read_sets

# What each row asks, and a row in other words: with columns of other names, a label, and an empty response.
ODD = {"columns": {"prompt": "ask", "system": "sys"}, "format": "pku", "preference": "safer", "empty": "drop"}


def odd(ask: str, safer: int = 1) -> dict[str, Any]:
    responses = {"response_0": f"0 {ask}", "response_1": f"1 {ask}"}
    return {"ask": ask, "sys": "be kind", **responses, "better_response_id": 0, "safer_response_id": safer}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(records: Sequence[Pair] | Sequence[Example]) -> set[str]:
    return {record.prompt.messages[-1]["content"] for record in records}


EMPTY = {**odd("empty"), "response_1": " "}


def test_the_settings_hold_for_a_teachers_own_file_test_files_and_documents(tmp_path: Path) -> None:
    main = write(tmp_path / "data" / "train.jsonl", [odd(f"q{i}") for i in range(8)] + [EMPTY])
    own = write(tmp_path / "own.jsonl", [*(odd(f"own{i}") for i in range(4)), odd("q0"), EMPTY])
    tests = write(tmp_path / "tests.jsonl", [*(odd(f"t{i}") for i in range(3)), odd("q1"), EMPTY])
    sizes = {"teacher_prompts": 2, "student_prompts": 3, "test_prompts": 4}
    data = DataSettings(path=main, test_path=tests, **ODD, **sizes)
    found = read_sources(data, {"a": None, "b": own}, seed=0)
    everything = [*found.teachers["a"], *found.teachers["b"], *found.student, *found.test]
    assert {pair.prompt.messages[0]["content"] for pair in everything} == {"be kind"}
    assert all(pair.chosen[0] == "1" and pair.rejected[0] == "0" for pair in everything)
    assert asked(found.test) == {"t0", "t1", "t2", "q1"} and len(found.teachers["a"]) == 2
    assert "q1" not in asked(found.student) | asked(found.teachers["a"]) and len(found.student) == 3
    assert {"own0", "own1", "own2", "own3"} <= asked(found.teachers["b"]) <= {"own0", "own1", "own2", "own3", "q0"}
    assert found.counts["train_test_overlap_dropped"] == 1 and found.counts["empty_dropped"] == 1
    assert found.counts["b_empty_dropped"] == found.counts["test_empty_dropped"] == 1
    documents = found.documents["student"]
    assert len(documents) == 2 * (8 - 1 - 2 - 3) and {d.response[0] for d in documents} == {"0", "1"}


def test_a_teacher_sees_as_many_prompts_of_its_own_data_as_it_is_said_to(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{name}{i} ?", "chosen": "yes " * 400, "rejected": "no " * 400} for name in "xy" for i in range(300)
    ]
    main, own = write(tmp_path / "main.jsonl", rows[:300]), write(tmp_path / "own.jsonl", [*rows[250:], rows[300]])
    teachers = [
        {"name": name, "init": INIT, "data": own, **more}
        for name, more in {"few": {"data_prompts": 40}, "all": {}, "many": {"data_prompts": 9_000}}.items()
    ]
    data = {"path": main, "teacher_prompts": 20, "student_prompts": 30, "test_prompts": 10}
    recipe = tiny(tmp_path / "run", data=data, teachers=[{"init": INIT}, *teachers])
    found = read_sources(recipe.data, {"few": own, "all": own}, 0, {"few": 40})
    few, everything = asked(found.teachers["few"]), asked(found.teachers["all"])
    assert len(few) == 40 and few < everything and not few & (asked(found.student) | asked(found.test))
    assert asked(read_sources(recipe.data, {"few": own}, 1, {"few": 40}).teachers["few"]) != few, "drawn by the seed"
    size = size_of(recipe)
    assert size.labels_of("few") == 40 and size.labels_of("teacher0") == size.teacher_prompts == 20
    assert size.labels_of("all") == size.labels_of("many") == pytest.approx(351, rel=0.1)
    steps = {stage.name: stage.work for stage in method_plan(recipe).graph.stages}
    assert steps["init-few-positive"].num_rows(size) == 40
    with pytest.raises(ValidationError, match="data_prompts is for a teacher with `data` of its own"):
        AgentSettings(init=INIT, data_prompts=3)


@pytest.mark.parametrize("kind", [PairData, ExampleData])
def test_the_settings_hold_for_standalone_test_data(kind: type[PairData | ExampleData], tmp_path: Path) -> None:
    for split, names in {"train": "abcd", "test": "xya"}.items():
        write(tmp_path / "data" / "sub" / f"{split}-00000-of-00001.jsonl", [*(odd(name) for name in names), EMPTY])
    write(tmp_path / "data" / "other" / "train.jsonl", [{"nothing": "of these"}])
    odd_settings = ODD | ({"format": "chosen"} if kind is ExampleData else {})
    data = kind(path=str(tmp_path / "data"), subset="sub", test_split="test", test_prompts=9, **odd_settings)
    sets: Sets = read_sets(data, seed=0)
    assert asked(sets.train) == {"b", "c", "d"} and asked(sets.test) == {"x", "y", "a"}
    texts = {row.response if isinstance(row, Example) else row.chosen for row in [*sets.train, *sets.test]}
    assert all(text[0] == "1" for text in texts)
    assert sets.counts["train_test_overlap_dropped"] == 1 and sets.counts["test_empty_dropped"] == 1


def test_a_file_cannot_hold_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [odd("a")])
    with pytest.raises(ConfigError, match=r"data.test_split: data.path is a file: it has no split 'test'.*test_path"):
        read_sets(PairData(path=path, test_split="test", **ODD), seed=0)
    with pytest.raises(ConfigError, match="no split 'test'"):
        read_sets(PairData(path=path, split="test", **ODD), seed=0)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_test_prompt_that_a_training_prompt_begins_with_is_reported(tmp_path: Path) -> None:
    responses = {"chosen": "good", "rejected": "bad"}
    longer = [{"prompt": turns(f"q{i}", "spoilt", "more"), **responses} for i in range(3)]
    path = write(tmp_path / "rows.jsonl", longer)
    tests = write(tmp_path / "tests.jsonl", [{"prompt": f"q{i}", **responses} for i in (0, 2, 7)])
    sets = read_sets(PairData(path=path, test_path=tests), seed=0)
    assert sets.counts["training_begins_with_test_prompt"] == 2
    data = DataSettings(path=path, test_path=tests, teacher_prompts=2, student_prompts=1, test_prompts=3)
    found = read_sources(data, {"a": None, "b": None}, seed=0)
    assert found.counts["training_begins_with_test_prompt"] == 2  # a set that two teachers share counts once


# --- records on disk ------------------------------------------------------------------------------------------------


def test_records_come_back_from_disk_as_they_were() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {"at": 1}}}]}
    tool = Prompt.of([*turns("what time"), call, {"role": "tool", "content": "9\u2028", "name": "clock"}], ("f", 3))
    pairs = [
        Pair(Prompt.of("u[]", ("f", 2)), "t", "[\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")),
        Pair(tool, "", "bad", chosen_parts=call),
        Pair(Prompt.of(turns("a", "b", "c")), "\n", "\0"),
    ]
    found = spooled(pairs, Pair)
    assert found == pairs and found[-1] == pairs[-1] and found[::2] == pairs[::2]
    assert [pair.prompt.origin for pair in found] == [("f", 2), ("f", 3), None]
    spool: Spool[Example] = Spool(Example)
    spool.add(pairs[1].example("chosen"))
    assert list(whole(spool)) == [pairs[1].example("chosen")]


@pytest.mark.parametrize("extra", [{}, {"name": "é"}])
def test_a_prompts_id_is_the_hash_of_its_json(extra: dict[str, str]) -> None:
    messages = [{"role": role, "content": '"\\\n\u2028\x1f\x7f/é\U0001f600', **extra} for role in ("user", "system")]
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    assert Prompt.of(messages).id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_order_of_prompts_is_the_hash_of_seed_and_prompt() -> None:
    pairs = [Pair(Prompt.of(f"q{i % 40}"), f"good {i}", "bad") for i in range(100)]
    prompts = Prompts(spooled(pairs, Pair), seed=3)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt.id, []).append(pair)
    order = sorted(by_prompt, key=lambda prompt: hashlib.sha256(f"3:{prompt}".encode()).digest())
    assert prompts.first(2, 9) == [by_prompt[each][0] for each in order[2:9]]
    assert prompts.every(35) == [pair for each in order[35:] for pair in by_prompt[each]]


# --- check and run --------------------------------------------------------------------------------------------------

REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def recipe_of(tmp_path: Path, rows: Sequence[dict[str, Any]], kind: str = "preference", **data: Any) -> Any:
    (tmp_path / "words.txt").write_text("question good bad response be kind user assistant system " * 3 + "\n")
    settings = {"path": write(tmp_path / "rows.jsonl", rows), "test_prompts": 5, **data}
    tree = {"recipe": kind, "output": str(tmp_path / "run"), "data": settings, "training": OPTIM, "compute": COMPUTE}
    init = INIT | {"corpus": str(tmp_path / "words.txt")}
    return KINDS[kind].model_validate(tree | {"template": REFUSING, "context_tokens": 32, "init": init})


def numbered(num: int, **last: Any) -> list[dict[str, Any]]:
    rows = [{"prompt": f"question {i}", "chosen": "good response", "rejected": "bad response"} for i in range(num)]
    return [*rows[:-1], rows[-1] | last]


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        ({"system": "be kind"}, {}, r"rows.jsonl:260: template: .*no system here.*prompt \w{16}: 'question 259'"),
        ({"rejected": " "}, {}, r"rows.jsonl:260: rejected: .*data.empty: drop"),
        ({"chosen": "good </s>"}, {"special_text": "error"}, r"rows.jsonl:260: .*</s>.*'question 259'"),
        ({"prompt": "question " * 40}, {"long_prompt": "error"}, r"rows.jsonl:260: .*'question question"),
    ],
)
def test_check_reads_and_encodes_every_row(row: Any, settings: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        list(check(recipe_of(tmp_path, numbered(260, **row), **settings)))


@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_rows_that_the_template_refuses_are_dropped_and_counted(kind: str, tmp_path: Path) -> None:
    rows = numbered(20, system="be kind")
    shown = "\n".join(check(recipe_of(tmp_path, rows, kind, refused="drop")))
    assert "all 15 rows, to train on" in shown and "1 refused by the template and dropped" in shown
    assert "good|response" in shown


def test_check_counts_responses_that_are_cut_on_both_sides(tmp_path: Path) -> None:
    long = "response " * 60
    rows = numbered(12, chosen=f"{long}good", rejected=f"{long}bad")
    shown = "\n".join(check(recipe_of(tmp_path, rows)))
    assert "1 chosen responses cut, 1 rejected responses cut, 1 pairs identical as tokens and dropped" in shown


def test_a_mistake_is_named_before_any_stage(tmp_path: Path) -> None:
    with pytest.raises(MacpoError, match=r"data\.test_split"):
        list(check(recipe_of(tmp_path, numbered(9), test_split="dev")))


def test_left_over_rows_are_written_once_and_only_where_an_agent_pretrains_on_them(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, numbered(12), train_prompts=3)
    for corpus, wanted in (("data", 8), (str(tmp_path / "words.txt"), None)):
        init = recipe.init.model_copy(update={"corpus": corpus})
        stages = build_plan(recipe.model_copy(update={"init": init})).graph.stages
        work = next(stage.work for stage in stages if stage.name == "data")
        folder = tmp_path / str(wanted)
        folder.mkdir()
        work.run(SimpleNamespace(dir=folder))  # type: ignore[arg-type]
        left = [path.name for path in folder.glob("documents*")]
        assert left == ([] if wanted is None else ["documents.jsonl"])
        if wanted is not None:
            assert len(list(read_jsonl(folder / "documents.jsonl"))) == wanted
        assert read_json(folder / "counts.json")["rows"] == {"train": 3, "test": 5}
