"""docs/many-gpus.md's batch script: its processes form one job, and it requeues on the exit codes that ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from pages import blocks_of
from standalone_runs import make_base, recipe_of

from macpo.engine.files import read_json
from macpo.engine.recipe import dump

SCRIPT = next(block.text for block in blocks_of("docs/many-gpus.md") if block.title == "train.sbatch")
SRUN = """#!/bin/bash
# Two tasks of one node, as srun starts them; ends with the highest exit code, as srun does.
[ "$1" = --kill-on-bad-exit=0 ] && shift
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@"; highest=$?
wait $first; code=$?
[ $code -gt $highest ] && highest=$code
exit $highest
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 && exit
echo "$@" >> asked
"""


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """A folder with the script, and stand-ins for SLURM's programs on its path."""
    (tmp_path / "train.sbatch").write_text(SCRIPT.replace("29500", str(29500 + os.getpid() % 1000)))
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "n"}
    settings = os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment
    words = ["bash", "train.sbatch", "mine.yaml"]
    return subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=300, check=False)


def test_its_processes_are_one_job(batch: Path) -> None:
    make_base(batch / "base")
    (batch / "mine.yaml").write_text(dump(recipe_of("sft", batch / "base", batch / "run")))
    done = run(batch)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_json(batch / "run" / "summary.json")["agents"] and not (batch / "asked").exists()


@pytest.mark.parametrize(("code", "asked"), [(75, ["requeue 17"]), (76, ["requeue 17"]), (7, []), (2, [])])
def test_it_requeues_what_can_go_on(batch: Path, code: int, asked: list[str]) -> None:
    (batch / "bin" / "python").write_text(f"#!/bin/bash\nexit {code}\n")
    (batch / "bin" / "python").chmod(0o755)
    assert run(batch).returncode == code
    found = (batch / "asked").read_text().splitlines() if (batch / "asked").exists() else []
    assert found == asked


def test_it_asks_slurm_for_a_signal_before_the_limit() -> None:
    assert "#SBATCH --signal=TERM@" in SCRIPT and "#SBATCH --requeue" in SCRIPT and (ROOT / "engine/train.py").exists()
