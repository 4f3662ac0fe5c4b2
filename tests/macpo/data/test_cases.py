"""Rows as people have them: each is read as what it means, or refused by name; and every setting of the data block."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from macpo.data.examples import load_examples
from macpo.data.preferences import load_preferences
from macpo.data.rows import Source
from macpo.engine.data.records import Pair
from macpo.engine.errors import ConfigError, DataError, MacpoError

CASES = Path(__file__).parents[4] / "shared" / "cases" / "data"
Rows = list[dict[str, Any]]


def lines(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(pair: Pair) -> tuple[list[str], str, str]:
    return [f"{m['role'][0]}:{m['content']}" for m in pair.prompt.messages], pair.chosen, pair.rejected


def turn(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


A = {"chosen": "good", "rejected": "bad"}
DIALOGUE = [turn("q"), turn("good", "assistant")]
WORSE = [turn("q"), turn("bad", "assistant")]


@pytest.mark.parametrize(
    ("rows", "settings", "wanted"),
    [
        # a `system` column is a message, also under another name; one of white space is none
        ([{"prompt": "q", "system": "be kind", **A}], {}, (["s:be kind", "u:q"], "good", "bad")),
        ([{"prompt": "q", "system": " ", **A}], {}, (["u:q"], "good", "bad")),
        (
            [{"ask": "q", "sys": "x", **A}],
            {"columns": {"prompt": "ask", "system": "sys"}},
            (["s:x", "u:q"], "good", "bad"),
        ),
        (
            [{"system": "x", "chosen": [turn("x", "system"), *DIALOGUE], "rejected": [turn("x", "system"), *WORSE]}],
            {},
            (["s:x", "u:q"], "good", "bad"),
        ),
        # messages that were stored as text, as JSON and as Python write them, one or many
        ([{"chosen": str(DIALOGUE), "rejected": json.dumps(WORSE)}], {}, (["u:q"], "good", "bad")),
        (
            [{"prompt": str([turn("q")]), "chosen": str(DIALOGUE[-1]), "rejected": json.dumps(WORSE[-1])}],
            {},
            (["u:q"], "good", "bad"),
        ),
        # text is kept to the character
        (
            [{"prompt": " f():\n", "chosen": "    return 1\n", "rejected": "\tpass "}],
            {},
            (["u: f():\n"], "    return 1\n", "\tpass "),
        ),
        ([{"prompt": "[1, 2]", "chosen": "[{'a': 1}]", "rejected": "{}"}], {}, (["u:[1, 2]"], "[{'a': 1}]", "{}")),
        # each row by its own layout
        ([{"prompt": None, "chosen": DIALOGUE, "rejected": WORSE}, {"prompt": "q", **A}], {}, (["u:q"], "good", "bad")),
        ([{"prompt": "q", **A}, {"prompt": None, "chosen": DIALOGUE, "rejected": WORSE}], {}, (["u:q"], "good", "bad")),
        (
            [{"prompt": None, **{s: f"\n\nHuman: q\n\nAssistant: {t}" for s, t in A.items()}}, {"prompt": "q", **A}],
            {},
            (["u:q"], "good", "bad"),
        ),
    ],
)
def test_rows_are_read_as_what_they_mean(rows: Rows, settings: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    pairs, _ = load_preferences(Source(lines(tmp_path / "rows.jsonl", rows), **settings))
    assert [said(pair) for pair in pairs] == [wanted] * len(rows)
    assert [pair.prompt.origin for pair in pairs] == [(str(tmp_path / "rows.jsonl"), n + 1) for n in range(len(rows))]


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([{"question": "q", **A}], {}, r"rows.jsonl:1: prompt: missing.*data.columns: \{prompt: question\}"),
        ([{"query": "q", "better": "x", "worse": "y"}], {}, r"\{prompt: query, chosen: better, rejected: worse\}"),
        ([{"prompt": "q", **A}, {"prompt": None, **A}], {}, r"rows.jsonl:2: prompt: null"),
        (
            [{"prompt": "q", **A, "x": "s"}],
            {"columns": {"history": "x"}},
            "data.columns: 'history' .*is not read",
        ),
        ([{"prompt": "q", **A}], {"columns": {"system": "sys"}}, "sys: data.columns names it for 'system'"),
        (
            [
                {
                    "prompt": "q",
                    "system": "a",
                    "chosen": [turn("b", "system"), *DIALOGUE],
                    "rejected": [turn("b", "system"), *WORSE],
                }
            ],
            {},
            "system: it is not",
        ),
        (
            [{"prompt": "q", "chosen": "[{'role': 'assistant', 'content': 'it's'}]", "rejected": "bad"}],
            {},
            "chosen: chat messages stored as text",
        ),
    ],
)
def test_rows_are_refused_by_name(rows: Rows, settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(MacpoError, match=problem):
        load_preferences(Source(lines(tmp_path / "rows.jsonl", rows), **settings))


@pytest.mark.parametrize(
    "row",
    [{"rejected": " "}, {"rejected": None}, {"prompt": ""}, {"chosen": []}, {"chosen": [turn("\n", "assistant")]}],
)
def test_empty_rows_are_an_error_or_dropped_and_counted(row: dict[str, Any], tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "q", **A}, {"prompt": "p", **A, **row}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*data.empty: drop"):
        load_preferences(path)
    pairs, counts = load_preferences(path, empty="drop")
    assert len(pairs) == 1 and counts["empty_dropped"] == 1


def test_empty_examples_are_an_error_or_dropped_and_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}, {"prompt": "p", "response": " "}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: response: .*data.empty: drop"):
        load_examples(path)
    examples, counts = load_examples(path, empty="drop")
    assert [e.response for e in examples] == ["a"] and counts["empty_dropped"] == 1


def test_contradictions_are_counted_and_kept_or_dropped(tmp_path: Path) -> None:
    flipped = {"chosen": "bad", "rejected": "good"}
    rows = [{"prompt": "q", **A}, {"prompt": "p", **A}, {"prompt": "q", **flipped}, {"prompt": "q", **A}]
    path = lines(tmp_path / "rows.jsonl", rows)
    pairs, counts = load_preferences(path)
    assert len(pairs) == 4 and counts["contradictory_pairs"] == 3 and counts["duplicate_rows"] == 1
    pairs, counts = load_preferences(path, contradictions="drop")
    assert [p.prompt.messages[0]["content"] for p in pairs] == ["p"] and counts["contradictory_dropped"] == 3
    assert len(load_examples(path, contradictions="drop")[0]) == 1


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.json", "wrapped.json", "splits.json", "list.json"])
def test_csv_and_wrapped_json_are_read(name: str, tmp_path: Path) -> None:
    rows: Rows = [{"prompt": "a\nb, c", "chosen": ' "x"\t', "rejected": "y"}, {"prompt": "b", **A}]
    path = tmp_path / name
    if name == "rows.json":  # one object a line
        lines(path, rows)
    elif name.endswith(".json"):
        other = [{"prompt": "t", **A}]
        tree = {"wrapped.json": {"version": 1, "data": rows}, "splits.json": {"test": other, "train": rows}}
        path.write_text(json.dumps(tree.get(name, rows), indent=1))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if name.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(rows)
    wanted = [(["u:a\nb, c"], ' "x"\t', "y"), (["u:b"], "good", "bad")]
    assert [said(pair) for pair in load_preferences(path)[0]] == wanted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,chosen\na,b,c\n", r"rows.csv:2: 3 cells, and the first line names 2 columns"),
        ('prompt,chosen\n"a\nb",c\n"d', r"rows.csv:4: not readable as CSV"),
        ("prompt,prompt\na,b\n", r"rows.csv:1: two columns have one name"),
    ],
)
def test_broken_csv_names_its_line(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        list(Source(tmp_path / "rows.csv").rows())


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"train": [{"prompt": "q", **A}], "test": []}, r"no split 'dev' in .*whose keys train, test|no split 'dev'"),
        ({"other": [{"prompt": "q", **A}], "more": [{"prompt": "q", **A}]}, "whose keys other, more hold rows"),
    ],
)
def test_a_split_that_is_no_key_of_wrapped_json_is_named(tree: Any, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=problem):
        load_preferences(Source(tmp_path / "rows.json", split="dev"))


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        (
            "c03_orca.jsonl",
            {"columns": {"prompt": "question"}},
            (["s:Answer in one word.", "u:Colour of sky 1?"], "Blue1"),
        ),
        ("c06_stringified.jsonl", {}, (["u:Say hi 1"], "Hi 1!")),
        ("c09_indent.jsonl", {}, (["u:def f1(x):\n"], "    if x:\n        return 1\n    return 0\n")),
        ("c12.csv", {}, (["u:Say hi 1"], "Hi 1")),
        ("c13_wrapped.json", {}, (["u:Say hi 1"], "Hi 1")),
        ("c21_mixed_prompt.jsonl", {}, (["u:Q 1"], "A 1")),
    ],
)
def test_cases_that_people_reported(name: str, settings: dict[str, Any], wanted: Any) -> None:
    pairs, _ = load_preferences(Source(CASES / name, **settings))
    assert said(pairs[1])[:2] == wanted


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
def test_cases_that_a_setting_decides() -> None:
    with pytest.raises(DataError, match=r"c03_orca.jsonl:1: prompt: missing.*data.columns: \{prompt: question\}"):
        load_preferences(CASES / "c03_orca.jsonl")
    with pytest.raises(DataError, match=r"c04_empty.jsonl:\d+: rejected: .*data.empty: drop"):
        load_preferences(CASES / "c04_empty.jsonl")
    assert load_preferences(CASES / "c04_empty.jsonl", empty="drop")[1]["empty_dropped"] == 1
    counts = load_preferences(CASES / "c07_flipped.jsonl")[1]
    assert counts["contradictory_pairs"] == counts["pairs"] == counts["rows"]
    with pytest.raises(DataError, match=r"no preference pair is left .*contradictory_dropped"):
        load_preferences(CASES / "c07_flipped.jsonl", contradictions="drop")
