"""Waves: committed, resumed and shared among ranks without a byte of difference."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import forked, ranks
from generation_checks import some_prompts
from wave_job import PARAMS, run

from macpo.engine import progress
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, Stopped
from macpo.engine.generation import SamplingParams
from macpo.engine.generation.waves import assigned


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "waves").glob("*.jsonl"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows and files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), contents(folder)


def test_rows_and_files(whole: tuple[list[dict[str, Any]], dict[str, bytes]]) -> None:
    rows, files = whole
    assert list(files) == ["0000.jsonl", "0001.jsonl", "0002.jsonl", "0003.jsonl"]
    assert [row["id"] for row in rows] == [f"p{i:02d}" for i in range(20)]
    lines = [json.loads(line) for data in files.values() for line in data.split(b"\n")[:-2]]
    assert lines == rows
    for row in rows:
        assert row["num_tokens"] == len(row["token_ids"])
        assert row["finish_reason"] == ("length" if row["num_tokens"] == 9 else "stop")
        assert (row["end_token"] is None) == (row["end_logp"] is None) == (row["finish_reason"] == "length")
        assert row["empty"] == (not row["text"].strip())
        assert row["sum_logp"] <= 0


def test_empty_responses_are_drawn_again_once(
    whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path
) -> None:
    """Attempt 1 stands only where attempt 0 was empty; what is still empty is marked. Greedy gains nothing from it."""
    rows, _ = whole
    again = [row for row in rows if row["attempt"]]
    assert 0 < len(again) < len(rows)
    assert {row["attempt"] for row in rows} == {0, 1}
    assert any(not row["empty"] for row in again)
    assert all(row["attempt"] == 1 for row in rows if row["empty"])
    nothing = run(tmp_path / "nothing", decode=lambda ids: " \n")
    assert all(row["empty"] and row["attempt"] == 1 for row in nothing)
    first = {row["id"]: row["token_ids"] for row in rows}
    assert any(row["token_ids"] != first[row["id"]] for row in nothing)
    greedy = SamplingParams(temperature=0, max_new_tokens=3)
    assert all(row["attempt"] == 0 for row in run(tmp_path / "greedy", params=greedy, decode=lambda ids: ""))


def test_stopped_and_resumed(whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path) -> None:
    """Stopped inside the third wave: two waves are on disk, the next call goes on from there."""
    rows, files = whole
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return len(list((tmp_path / "waves").glob("*.jsonl"))) == 2 and asked > 4

    with pytest.raises(Stopped):
        run(tmp_path, should_stop=should_stop)
    kept = contents(tmp_path)
    assert len(kept) == 2 and kept.items() <= files.items()
    assert run(tmp_path) == rows
    assert contents(tmp_path) == files


def test_progress_counts_every_response_and_token(
    whole: tuple[list[dict[str, Any]], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What an earlier attempt wrote counts as done, but not as speed."""
    rows, files = whole
    (tmp_path / "waves").mkdir()
    (tmp_path / "waves" / "0000.jsonl").write_bytes(files["0000.jsonl"])
    counts: list[tuple[int, int]] = []
    add = progress.Progress.add

    def noted(self: progress.Progress, done: int = 0, tokens: int = 0) -> None:
        counts.append((done, tokens))
        add(self, done, tokens)

    monkeypatch.setattr(progress.Progress, "add", noted)
    assert run(tmp_path, progress="student-answer") == rows
    assert sum(done for done, _ in counts) == 14  # one that is drawn a second time is still one
    first = [row["num_tokens"] for row in rows[6:] if not row["attempt"]]
    assert sum(tokens for _, tokens in counts) == sum(first) > 0  # those that were empty had none
    shown = capsys.readouterr().err
    assert re.fullmatch(r"student-answer: 20/20 responses, [\d,]+ tok/s\n", shown), shown
    run(tmp_path, progress="student-answer")
    assert not capsys.readouterr().err, "nothing is left to write"


def test_killed_while_a_wave_is_written(whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path) -> None:
    rows, files = whole

    def killed() -> None:
        os.environ["MACPO_KILL_AT"] = "file-written:2"
        run(tmp_path)

    assert forked(killed) == -9
    assert len(contents(tmp_path)) == 1
    assert run(tmp_path) == rows
    assert contents(tmp_path) == files


def test_torn_damaged_and_foreign_waves_are_written_anew(
    whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, files = whole
    folder = tmp_path / "waves"
    folder.mkdir()
    torn, flipped = files["0000.jsonl"], bytearray(files["0001.jsonl"])
    flipped[10] ^= 1
    unsealed = files["0003.jsonl"]
    (folder / "0000.jsonl").write_bytes(torn[: len(torn) - 20])  # inside the last line
    (folder / "0001.jsonl").write_bytes(flipped)
    (folder / "0002.jsonl").write_bytes(files["0002.jsonl"])
    (folder / "0003.jsonl").write_bytes(unsealed[: unsealed.rindex(b"\n", 0, -1) + 1])  # whole rows, no last line
    before = (folder / "0002.jsonl").stat().st_mtime_ns
    assert run(tmp_path) == rows
    assert contents(tmp_path) == files
    assert (folder / "0002.jsonl").stat().st_mtime_ns == before
    told = {record.getMessage().split()[0] for record in caplog.records if "written again" in record.getMessage()}
    assert told == {"0000.jsonl", "0001.jsonl", "0003.jsonl"}

    for cut in (0, 1, len(torn) // 2):
        (folder / "0000.jsonl").write_bytes(torn[:cut])
        assert run(tmp_path) == rows
    assert contents(tmp_path) == files

    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"[" * 100_000 + b"\n"))):
        (folder / f"000{number}.jsonl").unlink()
        make(folder / f"000{number}.jsonl")
    (folder / "0001.jsonl" / "x").write_text("x")
    assert run(tmp_path) == rows
    assert contents(tmp_path) == files and len(list(folder.iterdir())) == len(files)

    other = run(tmp_path, params=replace(PARAMS, seed=8))
    assert [row["token_ids"] for row in other] != [row["token_ids"] for row in rows]
    assert run(tmp_path, purpose="another") != other


def test_two_ranks_write_the_same_files(whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path) -> None:
    rows, files = whole

    def body(world: World) -> None:
        (tmp_path / f"rows{world.rank}.json").write_text(json.dumps(run(tmp_path, world=world)))

    assert ranks(2, body) == [0, 0]
    assert contents(tmp_path) == files
    assert [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in range(2)] == [rows, rows]


def test_waves_are_cut_by_id_and_assigned_longest_first(
    whole: tuple[list[dict[str, Any]], dict[str, bytes]], tmp_path: Path
) -> None:
    _, files = whole
    costs = [5, 9, 2, 7, 4, 1]
    shares = [assigned(costs, World(rank, 3)) for rank in range(3)]
    assert shares == [[1, 5], [3, 2], [0, 4]]  # loads 10, 9, 9
    requests = [(f"p{i:02d}", prompt) for i, prompt in enumerate(some_prompts([3 + i % 7 for i in range(20)]))]
    run(tmp_path, requests=requests[::-1])
    assert contents(tmp_path) == files


def test_requests_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    good = [("a", [5, 6])]
    with pytest.raises(DataError, match="two requests have this id"):
        run(tmp_path / "x", requests=[*good, *good], wave_requests=1)
    with pytest.raises(DataError, match="the prompt is empty"):
        run(tmp_path / "x", requests=[*good, ("b", [])], wave_requests=1)
    with pytest.raises(ConfigError, match="wave_requests"):
        run(tmp_path / "x", requests=good, wave_requests=0)
    assert not (tmp_path / "x").exists()
    assert run(tmp_path / "none", requests=[], params=PARAMS) == []


def test_samples_have_rows_of_their_own(tmp_path: Path) -> None:
    params = SamplingParams(max_new_tokens=5, n=3, temperature=1.3)
    rows = run(tmp_path, params=params)
    assert [(row["id"], row["sample"]) for row in rows[:4]] == [("p00", 0), ("p00", 1), ("p00", 2), ("p01", 0)]
    assert len(rows) == 60
