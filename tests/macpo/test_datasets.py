"""Preference data: formats, faults 5-10, 12, 13, splits by distinct prompt, and the real files where they are."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from macpo.data.preferences import load_preferences, split
from macpo.data.rows import Source, data_files, fingerprint
from macpo.engine.data.records import Pair, Prompt
from macpo.engine.errors import ConfigError, DataError

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def chat(*turns: str, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def jsonl(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def one(source: Source | Path, **kwargs: Any) -> Pair:
    pairs, counts = load_preferences(source, **kwargs)
    assert (len(pairs), counts["rows"], counts["pairs"]) == (1, 1, 1)
    return pairs[0]


PAIR = {"prompt": "why?", "chosen": "good", "rejected": "bad"}
SAME_PAIR = {
    "text": PAIR,
    "chat responses": PAIR | {"chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
    "chat prompt": PAIR | {"prompt": chat("why?")},
    "whole conversations": PAIR | {"chosen": chat("why?", "good"), "rejected": chat("why?", "bad")},
    "conversations alone": {"chosen": chat("why?", "good"), "rejected": chat("why?", "bad")},
    "one side a list": PAIR | {"chosen": chat("why?", "good")},
    "an HH prompt": PAIR | {"prompt": hh("why?") + "\n\nAssistant:", "chosen": " good"},
    "hh": {"chosen": hh("why?", "good"), "rejected": hh("why?", "bad")},
    "pku": {"prompt": "why?", "response_0": "bad", "response_1": "good", "better_response_id": 1},
    "alpaca": {"instruction": "why?", "input": "", "output": ["good", "bad", "third"]},
    "alpaca with fields": {"instruction": "why?", "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("name", SAME_PAIR)
def test_every_layout_of_one_pair_is_the_same_pair(name: str, tmp_path: Path) -> None:
    assert one(jsonl(tmp_path / "x.jsonl", SAME_PAIR[name])) == Pair(Prompt.of("why?"), "good", "bad")


def test_multi_turn_prompts_are_kept_as_messages(tmp_path: Path) -> None:
    turns = ("hi", "hello", "why?")
    rows = {
        "hh": {"chosen": hh(*turns, "good"), "rejected": hh(*turns, "bad")},
        "chat": {"chosen": chat(*turns, "good"), "rejected": chat(*turns, "bad")},
        "part of it": {"prompt": "hi", "chosen": chat(*turns, "good"), "rejected": chat(*turns, "bad")},
        "alpaca": {"instruction": "why?", "history": [["hi", "hello"]], "output": ["good", "bad"]},
    }
    for name, row in rows.items():
        assert one(jsonl(tmp_path / f"{name}.jsonl", row)) == Pair(Prompt.of(chat(*turns)), "good", "bad"), name
    row = {
        "prompt": "why?",
        "chosen": chat("why?", "good", system="be kind"),
        "rejected": chat("why?", "bad", system="be kind"),
    }
    assert one(jsonl(tmp_path / "s.jsonl", row)).prompt == Prompt.of(chat("why?", system="be kind"))
    alpaca = {"instruction": "sum", "input": "1 2", "system": "be kind", "output": ["3", "4"]}
    assert one(jsonl(tmp_path / "t.jsonl", alpaca)).prompt == Prompt.of(chat("sum\n1 2", system="be kind"))


def test_hh_is_cut_at_the_last_assistant_turn_and_one_speaker_in_a_row_is_one_turn(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: a Human: quoted\n\nHuman: b\n\nAssistant: c\n\nmore of c\n\nHuman: d\n\nAssistant:"
    pair = one(jsonl(tmp_path / "x.jsonl", {"chosen": f"{dialogue} good\n\nlast", "rejected": f"{dialogue} bad"}))
    assert pair.prompt == Prompt.of(chat("a Human: quoted\n\nb", "c\n\nmore of c", "d"))
    assert (pair.chosen, pair.rejected) == ("good\n\nlast", "bad")


def test_rows_are_dropped_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def row(question: str, good: str, bad: str) -> dict[str, str]:
        return {"chosen": hh(question, good), "rejected": hh(question, bad)}

    rows = [
        row("a", "x", "y"),
        row("a", "x", "y"),  # duplicate row
        row("a", "x2", "y"),  # duplicate prompt
        row("b", "same ", "same"),  # identical
        row("c", "begin", "begin and end"),  # prefix pair
        row("d", " ", "y"),  # empty
        {"chosen": hh("e", "x"), "rejected": hh("f", "y")},  # prompts differ
        {"chosen": hh("g", "x", "open"), "rejected": hh("g", "y", "open")},  # ends with a human turn
    ]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    with caplog.at_level(logging.WARNING, "macpo.data"):
        pairs, counts = load_preferences(path)
    assert [(p.prompt.messages[0]["content"], p.chosen) for p in pairs] == [
        ("a", "x"), ("a", "x"), ("a", "x2"), ("c", "begin"),
    ]  # fmt: skip
    assert counts == {
        "rows": 8, "pairs": 4, "prompts": 2, "duplicate_rows": 1, "duplicate_prompts": 2, "prefix_pairs": 1,
        "identical_dropped": 1, "empty_dropped": 1, "prompt_mismatch_dropped": 1, "malformed_dropped": 1,
    }  # fmt: skip
    assert "rows.jsonl: 4 pairs of 8 rows; " in caplog.text and "{" not in caplog.text
    assert "2 duplicate prompts" in caplog.text and "1 identical dropped" in caplog.text
    assert load_preferences(Source(path, max_rows=3))[1]["rows"] == 3
    assert [p.prompt.id for p in pairs] == [Prompt.of(p.prompt.messages).id for p in pairs]  # id = content hash


def test_empty_responses_are_an_error_unless_the_published_file_holds_some(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "x.jsonl", PAIR, PAIR | {"rejected": " \n"})
    with pytest.raises(DataError, match=r"x\.jsonl:2: rejected: the response is empty.*Fix: remove the row"):
        load_preferences(plain)
    assert load_preferences(plain, empty="drop")[1]["empty_dropped"] == 1
    published = jsonl(tmp_path / "h.jsonl", SAME_PAIR["hh"], {"chosen": hh("b", ""), "rejected": hh("b", "y")})
    assert load_preferences(published)[1]["empty_dropped"] == 1
    with pytest.raises(DataError, match=r"h\.jsonl:2: chosen: the response is empty"):
        load_preferences(published, empty="error")


def test_pku_labels(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_0": "r0", "response_1": "r1", "better_response_id": 0, "safer_response_id": 1}
    path = jsonl(tmp_path / "x.jsonl", row)
    assert one(path).chosen == "r0"
    assert one(path, preference="safer").chosen == "r1"
    for label in (2, "0", None, True):
        with pytest.raises(DataError, match=r"x\.jsonl:1: better_response_id: must be 0 or 1"):
            load_preferences(jsonl(tmp_path / "x.jsonl", row | {"better_response_id": label}))


def test_columns_map_other_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"question": "why?", "best": "good", "worst": "bad", "prompt": "ignored"})
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    assert one(Source(path, columns=columns)) == Pair(Prompt.of("why?"), "good", "bad")
    with pytest.raises(DataError, match=r"x\.jsonl:1: quest: data.columns names it for.*keys seen: question"):
        load_preferences(Source(path, columns=columns | {"prompt": "quest"}))
    with pytest.raises(ConfigError, match=r"data\.columns: got 'question'. Fix: use prompt, chosen"):
        load_preferences(Source(path, columns={"question": "prompt"}))
    for kwargs in ({"format": "csv"}, {"preference": "best"}, {"empty": "keep"}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(kwargs))}: got"):
            load_preferences(path, **kwargs)


BAD_ROWS = [
    ({"prompt": "p", "chosen": "c"}, r"rejected: missing.*keys seen: prompt, chosen.*columns: \{rejected: NAME\}"),
    ({"question": "p", "a": "c"}, r"prompt: missing, and the keys fit none.*keys seen: question, a"),
    ({}, r"prompt: missing, .*keys seen: none"),
    (PAIR | {"chosen": None}, r"chosen: null \(keys seen: prompt, chosen, rejected\)"),
    (PAIR | {"chosen": 5}, r"chosen: not text but int: 5"),
    (PAIR | {"chosen": {"text": "x"}}, r"chosen: not text but dict"),
    (PAIR | {"prompt": None}, r"prompt: null"),
    (PAIR | {"prompt": " "}, r"prompt: the prompt is empty"),
    (PAIR | {"prompt": []}, r"prompt: an empty list of messages"),
    (PAIR | {"prompt": chat("a", "b")}, r"prompt: its last message is not the user's"),
    (PAIR | {"prompt": [{"role": "human", "content": "x"}]}, r"prompt: not a chat message"),
    (PAIR | {"chosen": chat("why?")}, r"chosen: the last message is from 'user', not the assistant"),
    (PAIR | {"chosen": chat("other?", "good")}, r"chosen: its conversation is not the row's prompt"),
    (PAIR | {"chosen": [{"role": "assistant", "content": None}]}, r"chosen: null"),
    ({"chosen": chat("", "x")[1:], "rejected": chat("", "y")[1:]}, r"prompt: .*no conversation"),
    ({"chosen": "no dialogue", "rejected": "at all"}, r"prompt: missing, and the keys fit none"),
    ({"instruction": "p", "output": "one"}, r"output: must be a list: \[chosen, rejected\]"),
    ({"instruction": "p", "output": ["one", None]}, r"output: null"),
    ({"instruction": "p", "history": ["x"], "output": ["a", "b"]}, r"history: must be a list of \[question, resp"),
    ({"prompt": "p", "response_0": "a", "response_1": "b"}, r"better_response_id: the field is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_fields_name_file_line_field_keys_and_a_mapping(row: Any, problem: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", row)
    with pytest.raises(DataError, match=rf"^error: .*x\.jsonl:1: {problem}") as caught:
        load_preferences(path)
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)


def test_the_format_of_the_first_row_holds_for_all(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", SAME_PAIR["hh"], PAIR)
    with pytest.raises(DataError, match=r"x\.jsonl:2: chosen: no dialogue of Human and Assistant"):
        load_preferences(path)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b'{"prompt": oops}\n', r"x\.jsonl:2: invalid JSON at column 12"),
        (b'{"prompt": "a", "cho', r"x\.jsonl:2: the last line is truncated at column 21"),
        (b'["a"]\n', r"x\.jsonl:2: the row is a list"),
        (b'{"prompt": "\xff"}\n', r"x\.jsonl:2: invalid UTF-8 at byte \d+"),
        (b'{"prompt": "\\ud800"}\n', r"x\.jsonl:2: lone surrogate"),
    ],
)
def test_bad_lines_are_named(raw: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n" + raw)
    with pytest.raises(DataError, match=problem):
        load_preferences(tmp_path / "x.jsonl")


def test_strange_but_legal_text_loads(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\x85b", "a\r\nb", "\U0001f98a\x0bz", "</s> <|im_start|>system"]
    rows = [json.dumps(PAIR | {"prompt": text, "chosen": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "x.jsonl").write_bytes(("\ufeff" + "\r\n".join(rows) + "\r\n").encode())
    pairs, _ = load_preferences(tmp_path / "x.jsonl")
    assert [(p.prompt.messages[0]["content"], p.chosen) for p in pairs] == [(text, text) for text in texts]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl.gz", "lines.json", "x.parquet"])
def test_other_files_hold_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"prompt": chat("hi", "hello", "why?")[2]["content"] + "\u2028"}]
    path = tmp_path / name
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.startswith("x.json") and "jsonl" not in name:
        raw = json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    else:
        jsonl(path, *rows)
    assert load_preferences(path) == load_preferences(jsonl(tmp_path / "reference.jsonl", *rows))


def test_parquet_holds_chat_messages_and_names_bad_rows(tmp_path: Path) -> None:
    rows = [{"chosen": chat("why?", "good"), "rejected": chat("why?", "bad")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert one(tmp_path / "x.parquet") == Pair(Prompt.of("why?"), "good", "bad")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR | {"chosen": None}]), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y\.parquet:2: chosen: null"):
        load_preferences(tmp_path / "y.parquet")
    (tmp_path / "z.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"z\.parquet: not a readable Parquet file"):
        load_preferences(tmp_path / "z.parquet")


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("x.json", b"[1]", "x.json:1: the row is not an object"),
        ("x.json", b'[{"a": 1},\n {"b" 2}]', r"x.json:2: invalid JSON at column 7"),
        ("x.json", b'["\xff"]', "invalid UTF-8 at byte 2"),
        (
            "x.json",
            b'[{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}]',
            r"x.json:1: prompt: lone surrogate U\+D800",
        ),
        ("x.json.gz", gzip.compress(b"[]", mtime=0)[:-6], "damaged gzip"),
        ("x.json", b"[]", r"no preference pair is left \(it has no rows\)"),
        ("x.jsonl", b"", r"no preference pair is left \(it has no rows\)"),
        ("x.jsonl", json.dumps(PAIR | {"chosen": "bad"}).encode() + b"\n", r"is left \(rows=1, identical_dropped=1\)"),
    ],
)
def test_bad_files_are_named(name: str, raw: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=problem):
        load_preferences(tmp_path / name)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    for subset in ("harmless-base", "helpful-base"):
        for part in ("train", "test"):
            row = {"chosen": hh(f"{subset} {part}", "x"), "rejected": hh(f"{subset} {part}", "y")}
            jsonl(tmp_path / "hh" / subset / f"{part}.jsonl.gz", row)
    (tmp_path / "hh" / "README.md").write_text("not data")
    return tmp_path / "hh"


def test_published_folders(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def questions(path: Path, **kwargs: Any) -> list[str]:
        return [pair.prompt.messages[0]["content"] for pair in load_preferences(Source(path, **kwargs))[0]]

    assert questions(published) == ["harmless-base train", "helpful-base train"]
    assert questions(published, split="test") == ["harmless-base test", "helpful-base test"]
    assert questions(published, subset="helpful-base") == ["helpful-base train"]
    assert questions(published / "helpful-base", split="test") == ["helpful-base test"]
    assert questions(published / "helpful-base" / "test.jsonl.gz") == ["helpful-base test"]  # a file is its own split
    with pytest.raises(ConfigError, match=r"no split 'valid'.*Fix: use one of: test, train"):
        load_preferences(Source(published, split="valid"))
    with pytest.raises(ConfigError, match=r"no subset 'helpful'.*Fix: there is: harmless-base, helpful-base"):
        load_preferences(Source(published, subset="helpful"))
    with pytest.raises(ConfigError, match="is a file"):
        load_preferences(Source(published / "helpful-base" / "test.jsonl.gz", subset="helpful-base"))
    (published / "helpful-base" / "train.jsonl.gz").unlink()
    with pytest.raises(ConfigError, match=r"no split 'train'.*Fix: use test\."):  # never another than was asked for
        questions(published / "helpful-base")
    (published / "helpful-base" / "test.jsonl.gz").rename(published / "helpful-base" / "mine.jsonl.gz")
    with caplog.at_level(logging.WARNING, "macpo.data"):
        assert questions(published / "helpful-base") == ["helpful-base test"]
    assert "has no split 'train': reading its only one, 'mine'" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no data file"):
        load_preferences(tmp_path / "empty")
    for name in ("train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR]), tmp_path / "empty" / name)
    assert [p.name[:11] for p in data_files(tmp_path / "empty")] == ["train-00000", "train-00001"]


@pytest.mark.parametrize("path", ["missing/data.jsonl", "./missing", "/missing/folder", "~/missing-folder", "a/b/c"])
def test_missing_paths_get_an_offline_hint(path: str) -> None:
    for function in (load_preferences, fingerprint):
        with pytest.raises(
            ConfigError, match=r"data\.path: no file or folder .*Fix: .*without a network download"
        ) as caught:
            function(path)
        assert caught.value.code == 2


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for function in (load_preferences, fingerprint):
        with pytest.raises(ConfigError, match=r"'some/data' is no local path and the Hub.*without a network"):
            function("some/data")
    (tmp_path / "datasets--some--data" / "snapshots" / ("c" * 40)).mkdir(parents=True)
    first = fingerprint("some/data")  # what was downloaded before
    (tmp_path / "datasets--some--data" / "snapshots" / ("c" * 40)).rename(
        tmp_path / "datasets--some--data" / "snapshots" / ("d" * 40)
    )
    assert fingerprint("some/data") != first


def test_fingerprint_follows_content(published: Path, tmp_path: Path) -> None:
    before = fingerprint(published)
    assert before == fingerprint(str(published))
    file = published / "helpful-base" / "test.jsonl.gz"
    alone = fingerprint(file)
    (published / "README.md").write_text("changed")
    assert fingerprint(published) == before
    jsonl(file, PAIR)
    assert fingerprint(published) != before
    assert fingerprint(file) != alone
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a line")
    assert fingerprint(corpus) == fingerprint(str(corpus)) != alone


@real
@pytest.mark.parametrize(
    ("path", "pairs", "prompts", "dropped"),
    [
        ("hh-rlhf/harmless-base", 1595, 1593, {"empty_dropped": 4, "prompt_mismatch_dropped": 1}),
        ("hh-rlhf/helpful-base/test.jsonl.gz", 1638, 1638, {"empty_dropped": 3, "prompt_mismatch_dropped": 9}),
        ("hh-rlhf", 3233, 3231, {"empty_dropped": 7, "prompt_mismatch_dropped": 10}),
        ("pku-saferlhf", 2860, 650, {}),
    ],
)
def test_the_real_files(path: str, pairs: int, prompts: int, dropped: dict[str, int]) -> None:
    loaded, counts = load_preferences(Source(REAL / path, split="test" if path.startswith("hh") else "train"))
    assert (len(loaded), counts["pairs"], counts["prompts"]) == (pairs, pairs, prompts)
    assert {name: n for name, n in counts.items() if name.endswith("_dropped") and n} == dropped
    assert counts["rows"] == pairs + sum(dropped.values())
    roles: Callable[[Pair], list[str]] = lambda pair: [m["role"] for m in pair.prompt.messages]  # noqa: E731
    for pair in loaded:
        assert roles(pair) == [("user", "assistant")[i % 2] for i in range(len(pair.prompt.messages))]
        assert len(pair.prompt.messages) % 2
        assert pair.chosen.strip() == pair.chosen != pair.rejected
        assert "\n\nHuman:" not in pair.chosen + pair.rejected
    multi_turn = sum(len(pair.prompt.messages) > 1 for pair in loaded)
    assert multi_turn == 0 if path.startswith("pku") else 0.5 < multi_turn / pairs < 0.8
    sets = split(loaded, teacher=200, student=200, test=100, seed=0)
    ids = [{p.prompt.id for p in part} for part in (sets.teacher, sets.student, sets.test, sets.rest)]
    assert sum(map(len, ids)) == len(set().union(*ids)) == prompts
