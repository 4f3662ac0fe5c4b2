"""A slice of `make torture`: kills and stops, spoilt runs, some thousand broken files, and those once found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import CORPUS, Bench, fuzz, show
from loaders import LOADERS

HERE = Path(__file__).parent
INPUTS = 60
SLOW = {"weights", "weights-index", "config", "tokenizer", "adapter"}  # milliseconds each
KEPT = sorted(path for path in CORPUS.glob("*/*/**/*") if path.is_file())


def tortured(part: str, *options: str) -> str:
    """What a part says in a process of its own, because the shim has to be loaded first; it has to find nothing."""
    command = [sys.executable, str(HERE / f"{part}.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "helpers"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_a_kill_of_every_kind_loses_nothing_and_leaves_nothing() -> None:
    said = tortured("kills", "--stages=4", "--per-kind=1", "--seed=1")
    assert ", 0 findings" in said and "middle" in said


def test_stops_at_random_moments_end_with_75_and_the_same_bits() -> None:
    assert "; 0 findings" in tortured("stops", "--minutes=0.2", "--how=KILL,TERM,INT,FULL", "--span=0.3", "--seed=1")


def test_a_spoilt_file_is_found_or_harmless() -> None:
    said = tortured("corruption", "--minutes=0.2", "--seed=1")
    assert ", 0 findings" in said and "corruption: 0 spoilt files" not in said


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", LOADERS)
def test_broken_files_are_taken_or_refused_in_a_line(name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    bench = Bench(LOADERS[name], scratch, seed=0)
    count, _ = fuzz(bench, 0, INPUTS // 4 if name in SLOW else INPUTS, deadline=float("inf"))
    assert not count.findings, show({name: count})


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: str(path.relative_to(CORPUS)))
def test_what_was_a_finding_is_none_any_more(kept: Path, tmp_path: Path) -> None:
    loader, _, *name = kept.relative_to(CORPUS).parts
    bench = Bench(LOADERS[loader], tmp_path, seed=0, kept=("/".join(name), kept.read_bytes()))
    count, _ = fuzz(bench, 0, 1, deadline=float("inf"))
    assert not count.findings, show({loader: count})
