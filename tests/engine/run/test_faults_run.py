"""Whole runs that are killed, stopped, starved and crowded (faults 20, 22, 26, 30, 34, 35, 36 at the stage level)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import toy_run

from macpo.engine.faults import POINTS
from macpo.engine.run.manifest import Manifest, is_hashed
from macpo.engine.run.runner import Runner

TOY = Path(toy_run.__file__)


def start(folder: Path, *words: str, config: str = "{}", **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOY), str(folder), config, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


def toy(folder: Path, *words: str, config: str = "{}", **env: str) -> tuple[int, str]:
    process = start(folder, *words, config=config, **env)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def content(folder: Path) -> dict[str, bytes]:
    """Every hashed file of every stage, and nothing else may lie in the run folder."""
    assert all(path.name[:2].isdigit() and path.suffix not in (".tmp", ".trash") for path in folder.iterdir())
    found = {}
    for stage in folder.iterdir():
        manifest = Manifest.read(stage)
        manifest.verify(stage, full=True)
        for path in stage.rglob("*"):
            relative = path.relative_to(stage).as_posix()
            assert not path.name.endswith(".part")
            if path.is_file() and is_hashed(relative):
                found[f"{stage.name}/{relative}"] = path.read_bytes()
    return found


def wait_for(file: Path, text: str, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 30
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < limit and process.poll() is None, f"never saw {text!r}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "run"
    assert toy(folder)[0] == 0
    return folder


# Points that a plain run passes, with a count that lies in the middle of it; the others are reached by --from.
MIDDLE = {name: 3 for name in POINTS if name.startswith(("stage-", "file-"))}
MIDDLE |= {"lock-taken": 1, "run-finished": 1, "append-torn": 8, "append-written": 8, "append-synced": 8}
ELSEWHERE = {"set-aside", "rerun-noted"}


def test_every_point_of_this_layer_is_killed_at() -> None:
    ours = {name for name in POINTS if not name.startswith("checkpoint-")}
    assert set(MIDDLE) | ELSEWHERE == ours and len(ours) >= 12


@pytest.mark.parametrize("name", MIDDLE)
def test_killed_anywhere_and_run_again_gives_the_same_bits(clean: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    code, said = toy(folder, MACPO_KILL_AT=f"{name}:{MIDDLE[name]}")
    assert code == -signal.SIGKILL, said
    code, said = toy(folder)
    assert code == 0, said
    assert "cleared the lock" in said
    assert content(folder) == content(clean)


@pytest.mark.parametrize("name", ["rerun-noted:1", "set-aside:2", "stage-renamed:2", "file-renamed:1"])
def test_a_rerun_killed_anywhere_goes_on_with_the_same_command(clean: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(clean, tmp_path / "run"))
    words = ("--from", "join1")
    assert toy(folder, *words, MACPO_KILL_AT=name)[0] == -signal.SIGKILL
    code, said = toy(folder, *words)
    assert code == 0, said
    assert content(folder) == content(clean)
    assert "nothing to do" in toy(folder)[1]


def test_resume_goes_on_inside_a_stage(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert toy(folder, MACPO_KILL_AT="append-torn:5")[0] == -signal.SIGKILL
    torn = (folder / "02-a1.tmp" / "rows.jsonl").read_bytes()
    assert torn.count(b"\n") == 4 and not torn.endswith(b"\n")
    assert toy(folder)[0] == 0
    status = {each.name: each for each in Runner(folder, toy_run.build({})).status()}
    assert status["a1"].counts["resumed_at"] == 4 and content(folder) == content(clean)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sigterm_stops_at_a_safe_point_and_the_run_goes_on(clean: Path, tmp_path: Path, jobs: str) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    process = start(folder, "--jobs", jobs, TOY_SLEEP="0.5", TOY_EVENTS=str(events))
    wait_for(events, "start a1", process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "error: stopped at " in said and "Fix: run the same command again" in said and "Traceback" not in said
    assert any(path.suffix == ".tmp" for path in folder.iterdir()) and not (folder / ".lock").exists()
    assert toy(folder)[0] == 0
    assert content(folder) == content(clean)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_twice_aborts(clean: Path, tmp_path: Path, jobs: str) -> None:
    """The terminal sends Ctrl-C to the whole group; the stage here looks at the flag only once in 30 s."""
    folder, events = tmp_path / "run", tmp_path / "events"
    process = start(folder, "--jobs", jobs, TOY_SLEEP="30", TOY_EVENTS=str(events))
    wait_for(events, "start a1", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    while "stopping at the next safe point" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "Ctrl-C" in said and "Traceback" not in said, said
    assert toy(folder)[0] == 0
    assert content(folder) == content(clean)


def test_jobs_do_not_change_the_bits_and_workers_are_reused(clean: Path, tmp_path: Path) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    code, said = toy(folder, "--jobs", "2", TOY_MEET="a1 b1", TOY_EVENTS=str(events))  # fails unless side by side
    assert code == 0, said
    assert content(folder) == content(clean)
    status = Runner(folder, toy_run.build({})).status()
    assert len({each.counts["pid"] for each in status}) == 2
    assert max(each.counts["calls"] for each in status) >= 3  # a module's cache outlives the stage
    assert {each.counts["omp"] for each in status} == {1}
    assert "nothing to do" in toy(folder, "--jobs", "2")[1]


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("data", 3, "error: input.jsonl:3: the row is no good. Fix: mend it."),
        ("crash", 1, "error: unexpected RuntimeError: ZeroDivisionError: a bug (in stage b1). Fix: rerun with --debug"),
        ("exit", 7, "error: stage b1: its worker process"),
        ("full", 4, "no space to write it (File too large), 16,384 bytes needed"),
    ],
)
def test_a_failing_worker_stops_the_others_cleanly(
    clean: Path, tmp_path: Path, how: str, code: int, message: str
) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    found, said = toy(folder, "--jobs", "2", TOY_FAIL=f"b1:{how}", TOY_SLEEP="0.1", TOY_EVENTS=str(events))
    assert found == code and message in said and "Traceback" not in said, said
    assert "start join1" not in events.read_text()
    assert toy(folder)[0] == 0
    assert content(folder) == content(clean)


def test_debug_shows_the_worker_traceback(tmp_path: Path) -> None:
    said = toy(tmp_path / "run", "--jobs", "2", "--debug", TOY_FAIL="data:crash")[1]
    assert 'raise ZeroDivisionError("a bug")' in said


@pytest.mark.parametrize("how", ["crash", "full", "data"])
def test_failures_in_one_process(clean: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    code, said = toy(folder, TOY_FAIL=f"a1:{how}")
    assert code == {"crash": 1, "full": 4, "data": 3}[how] and "Traceback" not in said
    assert toy(folder)[0] == 0
    assert content(folder) == content(clean)


def test_workers_die_with_their_parent(clean: Path, tmp_path: Path) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    process = start(folder, "--jobs", "2", TOY_SLEEP="30", TOY_EVENTS=str(events))
    wait_for(events, "start b1", process)
    workers = {int(line.split()[2]) for line in events.read_text().splitlines() if "1" in line.split()[1]}
    process.kill()
    process.communicate(timeout=10)
    assert len(workers) == 2
    limit = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert toy(folder)[0] == 0
    assert content(folder) == content(clean)


def test_a_killed_worker_group_resumes(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert toy(folder, "--jobs", "2", MACPO_KILL_AT="stage-manifest:2:group")[0] == -signal.SIGKILL
    code, said = toy(folder, "--jobs", "2", MACPO_KILL_AT="stage-hashed:1")
    assert code == 7 and "was killed by SIGKILL" in said and "Fix:" in said
    assert toy(folder, "--jobs", "2")[0] == 0
    assert content(folder) == content(clean)


def test_two_runs_at_once_in_one_folder(tmp_path: Path) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    process = start(folder, TOY_SLEEP="0.1", TOY_EVENTS=str(events))
    wait_for(events, "start a1", process)
    code, said = toy(folder)
    assert code == 2 and f"in use by process {process.pid} on {socket.gethostname()}" in said
    assert process.wait(timeout=30) == 0
    process.communicate()


# Several ranks


def ranks(folder: Path, config: str = "[{}]", **env: str) -> list[tuple[int, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **env}
    processes = [start(folder, "--ranked", config=config, RANK=str(rank), **group) for rank in (0, 1)]
    found: list[Any] = []
    for process in processes:
        try:
            said, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        found.append((process.returncode, said))
    return found


def test_ranks_run_a_stage_together_and_fail_together(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (code, said), (other_code, other_said) = ranks(folder, TOY_FAIL="more:data")
    assert other_code == 3 and "the row is no good" in other_said
    assert code == 7 and "error: rank 1 failed in more: error: input.jsonl:3: the row is no good" in said, said
    assert (folder / "01-shards").is_dir() and (folder / "02-more.tmp").is_dir()

    # The same run once more, then another with a changed setting, which rank 0 alone explains.
    (code, said), (other_code, other_said) = ranks(folder, config='[{}, {"changed": 1}]')
    assert sorted(content(folder)) == [f"{s}/shard-{r}.json" for s in ("01-shards", "02-more") for r in (0, 1)]
    assert "[1/2]" not in said and "[2/2] more done" in said and "changed: new -> 1" in said
    assert (code, other_code) == (2, 2) and other_said == ""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sigterm_in_the_last_stage_keeps_it_and_ends_with_75(clean: Path, tmp_path: Path, jobs: str) -> None:
    """What the caller does with the results would be cut short; the same command does it."""
    folder, events = tmp_path / "run", tmp_path / "events"
    process = start(folder, "--jobs", jobs, TOY_EVENTS=str(events), TOY_MEET="join2 signal")
    wait_for(events, "start join2", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with open(events, "a") as file:
        file.write("start signal 0\n")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "stopped at the end of the last stage" in said, said
    assert content(folder) == content(clean)
    assert "nothing to do" in toy(folder)[1]
