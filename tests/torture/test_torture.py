"""A slice of `make torture`: kills and stops, spoilt runs, some thousand broken files, and those once found."""

from __future__ import annotations

import os
import re
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


def test_kills_stops_and_spoilt_files_lose_nothing_and_leave_nothing() -> None:
    """A kill of every kind of call; stops end with 75 and the same bits; what is spoilt is found or harmless."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "helpers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sample.py")]  # a process of its own, because the shim has to be loaded first
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"kills: \d+ \(.*middle", done.stdout)
    assert re.search(r"[1-9]\d* spoilt files", done.stdout) and re.search(r"[1-9]\d* lives", done.stdout)
    assert done.stdout.count(" 0 findings") == 3


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
