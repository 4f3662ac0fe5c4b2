"""How many prompts are held out where the recipe does not say: at most a tenth, so that small data trains too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import macpo
from standalone_runs import recipe_of

from macpo.data_settings import DataSettings
from macpo.method.data_sets import num_prompts, read_pairs
from macpo.method.identities import Identities
from macpo.method.prompt_sets import read_sources
from macpo.standalone.config import PairData
from macpo.standalone.graph import build_plan
from macpo.standalone.records import read_sets


def pairs(path: Path, count: int, about: str = "tea") -> str:
    rows = (
        {"prompt": f"question {n} about {about} ?", "chosen": f"yes {n} .", "rejected": f"no {n} ."}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def key(tmp_path: Path, **data: Any) -> str:
    recipe = recipe_of("preference", tmp_path, tmp_path / "run", data=data)
    found = build_plan(recipe, Identities(must_exist=False)).graph.stages[0].settings["data"]["test_prompts"]
    return str(found)


@pytest.mark.parametrize(("count", "held_out"), [(60, 6), (5, 1), (2500, 200)])  # small, tiny, more than enough
def test_a_tenth_is_held_out_and_the_rest_is_trained_on(tmp_path: Path, count: int, held_out: int) -> None:
    data = PairData(path=pairs(tmp_path / "p.jsonl", count))
    sets = read_sets(data, 0)
    assert (len(sets.test), len(sets.train)) == (held_out, count - held_out)
    assert Identities().sized(data, read_pairs).test_prompts == held_out
    given = read_sets(data.model_copy(update={"test_prompts": held_out}), 0)
    assert [pair.prompt.id for pair in given.test] == [pair.prompt.id for pair in sets.test]


def test_the_method_holds_out_a_tenth_too(tmp_path: Path) -> None:
    data = DataSettings(path=pairs(tmp_path / "p.jsonl", 60), teacher_prompts=20, student_prompts=20)
    sources = read_sources(data, {"teacher0": None}, 0)
    assert (len(sources.test), len(sources.student), len(sources.teachers["teacher0"])) == (6, 20, 20)


def test_a_test_set_of_its_own_is_used_up_to_the_usual_number(tmp_path: Path) -> None:
    data = PairData(path=pairs(tmp_path / "p.jsonl", 60), test_path=pairs(tmp_path / "t.jsonl", 70, "milk"))
    assert Identities().sized(data, read_pairs).test_prompts == 70
    assert len(read_sets(data, 0).test) == 70


def test_keys_hold_the_number_itself_so_explicit_and_large_data_keep_theirs(tmp_path: Path) -> None:
    small, large = pairs(tmp_path / "s.jsonl", 60), pairs(tmp_path / "l.jsonl", 2500)
    assert key(tmp_path, path=large) == key(tmp_path, path=large, test_prompts=200) == "200"
    assert key(tmp_path, path=small) == key(tmp_path, path=small, test_prompts=6) == "6"
    assert key(tmp_path, path=small, test_prompts=200) == "200"
    assert key(tmp_path, world={}) == "200"
    assert key(tmp_path, path=str(tmp_path / "gone.jsonl")).startswith("unknown: ")
    assert PairData(world={}, test_prompts=200).key() == PairData(world={}).key()  # as earlier versions wrote it down


def test_a_large_file_is_not_read_to_its_end_to_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    pairs(path, 100)
    path.write_text(path.read_text() + "not JSON\n")
    data = PairData(path=str(path))
    assert num_prompts(data, read_pairs, None, 20) >= 20
    assert Identities().sized(data, read_pairs).test_prompts is None  # the stage that reads it all says what is wrong


def test_a_finished_run_of_small_data_stays_done_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pairs(tmp_path / "p.jsonl", 60)
    words = ["sft", "--set", f"data={{path: {path}, train_prompts: 20, format: chosen}}"]
    words += ["--set", f"output={tmp_path / 'run'}", "--set", "init.hidden_size=16", "--set", "init.num_heads=2"]
    assert macpo("run", *words) == 0
    assert json.loads(next((tmp_path / "run").glob("01-*/counts.json")).read_text())["rows"] == {"train": 20, "test": 6}
    capsys.readouterr()
    for recipe in (words, [tmp_path / "run"]):
        for _ in range(2):
            assert macpo("status", *recipe) == 0
            assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"done"}
            Path(path).unlink(missing_ok=True)
        pairs(Path(path), 60)
