"""Which files a split is: folders as people publish them, and files that would unpack to implausibly much."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from macpo.data.rows import Source, fingerprint
from macpo.data_settings import DataSettings
from macpo.engine.errors import ConfigError, DataError, MacpoError
from macpo.engine.unpacking import Limits
from macpo.method.data_sets import held_out_source, own_source, source_of


def jsonl(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"prompt": p, "chosen": "a", "rejected": "b"}) + "\n" for p in prompts)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.write(text)


def parquet(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"prompt": prompts, "chosen": ["a"] * len(prompts), "rejected": ["b"] * len(prompts)}), path
    )


def prompts(path: Path, **settings: Any) -> list[str]:
    return [row.fields["prompt"] for row in Source(path, **settings).rows()]


@pytest.mark.parametrize(
    ("write", "train", "test"),
    [
        (parquet, ["train/part-0.parquet", "train/part-1.parquet"], ["test/part-0.parquet"]),
        (
            parquet,
            ["train-00000-of-00002-1f2e3d4c5b6a.parquet", "train-00001-of-00002-1f2e3d4c5b6a.parquet"],
            ["test-00000-of-00001-0a1b2c3d4e5f.parquet"],
        ),
        (parquet, ["default/train/0000.parquet", "default/train/0001.parquet"], ["default/test/0000.parquet"]),
        (
            parquet,
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (jsonl, ["train_0.jsonl", "train_1.jsonl"], ["test_0.jsonl"]),
        (jsonl, ["a/train.jsonl.gz", "b/train.jsonl.gz"], ["a/test.jsonl.gz"]),
    ],
)
def test_published_layouts(write: Callable[..., None], train: list[str], test: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(train):
        write(tmp_path / name, f"q{number}")
    write(tmp_path / test[0], "t")
    (tmp_path / "README.md").write_text("about it")
    jsonl(tmp_path / ".cache" / "train.jsonl", "hidden")
    assert prompts(tmp_path) == ["q0", "q1"]
    assert prompts(tmp_path, split="test") == ["t"]
    with pytest.raises(ConfigError, match=r"no split 'validation' .*Fix: use one of: test, train"):
        prompts(tmp_path, split="validation")
    before = fingerprint(tmp_path)
    write(tmp_path / train[1], "another")
    assert fingerprint(tmp_path) != before


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "chosen": ["x"] * 3, "rejected": ["y"] * 3})
    rows.select([2, 0]).save_to_disk(tmp_path / "one")
    assert prompts(tmp_path / "one") == ["c", "a"]  # in the order that its state says, not that of its file
    splits = datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])})
    splits.save_to_disk(tmp_path / "two")
    assert prompts(tmp_path / "two") == ["a"] and prompts(tmp_path / "two", split="test") == ["b"]
    with pytest.raises(ConfigError, match=r"no split 'dev'.*test, train"):
        prompts(tmp_path / "two", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(MacpoError, match=r"state\.json|not a readable saved data set"):
        prompts(tmp_path / "one")


def test_one_split_in_two_forms_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", "a")
    jsonl(tmp_path / "train.jsonl.gz", "a")
    with pytest.raises(ConfigError, match=r"train.jsonl and train.jsonl.gz .*two forms"):
        prompts(tmp_path)


@pytest.mark.parametrize("name", ["test.jsonl", "test_0.jsonl", "test/0.jsonl", "validation-00000-of-00001.jsonl"])
def test_another_split_is_never_read_in_place_of_the_one_asked_for(name: str, tmp_path: Path) -> None:
    jsonl(tmp_path / name, "t")
    with pytest.raises(ConfigError, match="no split 'train'"):
        prompts(tmp_path)


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"no data file .*which holds notes.docx.*Fix: use .*\.parquet, \.csv"):
        prompts(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read files like 'notes.docx'"):
        prompts(tmp_path / "notes.docx")


# --- files that unpack to implausibly much -------------------------------------------------------------------------


SMALL = Limits(row_bytes=2**16, blank_lines=1000, unpacked_bytes=2**18)
"""The limits at a thousandth of their size, so that the test's files are small."""
ROW = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rows.jsonl.gz", ROW + " " * 60_000 + "\n", r"rows.jsonl.gz:\d+: the packed file holds more"),
        ("rows.csv.gz", "prompt,chosen\n" + "a,b\n" * 15_000, r"rows.csv.gz:\d+: the packed file holds more"),
        ("rows.json.gz", "\n" * 60_000, r"rows.json.gz:\d+: the packed file holds more"),
        ("rows.jsonl", ROW + "\n" * 1100, r"rows.jsonl:\d+: 1,001 blank lines in succession"),
        (
            "rows.jsonl",
            ROW + json.dumps({"prompt": "x" * 70_000}),
            r"rows.jsonl:2: the line is longer than 65,536 bytes",
        ),
        ("rows.csv", "prompt,chosen\n" + "\n" * 1100, r"rows.csv:\d+: 1,001 blank lines"),
        ("rows.csv", "prompt,chosen\na,b\n" + "x" * 70_000, r"rows.csv:3: the line is longer"),
    ],
)
def test_text_that_would_fill_the_memory_is_named_by_line(name: str, text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress((text * 500).encode()))
        assert path.stat().st_size * SMALL.unpacked_ratio < len(text) * 500
    else:
        path.write_text(text)
    with pytest.raises(DataError, match=problem) as caught:
        prompts(path, limits=SMALL)
    assert caught.value.code == 3


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_that_would_fill_the_memory_is_named_by_row_group(dictionary: bool, tmp_path: Path) -> None:
    text = "x" * 2**15
    table = pa.table({"prompt": [text] * 200, "chosen": ["a"] * 200})
    pq.write_table(table, tmp_path / "rows.parquet", compression="zstd", use_dictionary=dictionary, row_group_size=100)
    with pytest.raises(DataError, match=r"rows.parquet: row group [01] brings the file to more than"):
        prompts(tmp_path / "rows.parquet", limits=SMALL)


def test_the_data_block_sets_the_limits_of_every_file_that_is_read(tmp_path: Path) -> None:
    for name in ("train", "test", "own"):
        (tmp_path / f"{name}.jsonl").write_text(
            ROW + json.dumps({"prompt": "x" * 70_000, "chosen": "a", "rejected": "b"}) + "\n"
        )
    paths = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    small = DataSettings.model_validate(paths | {"limits": {"row_bytes": 2**16}})
    own = str(tmp_path / "own.jsonl")
    sources = source_of(small), held_out_source(small), own_source(small, own), own_source(small, str(tmp_path))
    for source in sources:
        assert source is not None
        with pytest.raises(DataError, match=r":2: the line is longer than 65,536 bytes"):
            list(source.rows())
    large = DataSettings.model_validate(paths)
    assert len(list(source_of(large).rows())) == 2
    assert small.key() == large.key(), "a limit that is not reached changes no row"
    with pytest.raises(ValueError, match="row_bytes"):
        DataSettings.model_validate(paths | {"limits": {"row_bytes": 0}})
