"""`macpo run --ranks`: starting, stopping and cleaning up ranks, with one message and exit code for all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import rank_toy
from tiny import tiny

from macpo.engine.console import run_cli
from macpo.engine.distributed.agree import pack_error
from macpo.engine.distributed.launcher import _Rank, launch
from macpo.engine.errors import ConfigError, PeerError, Stopped
from macpo.engine.recipe import dump


def start(what: str, folder: Path, **env: str) -> subprocess.Popen[str]:
    words = [sys.executable, rank_toy.__file__, what, str(folder)]
    out: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, **out, start_new_session=True, env={**os.environ, **env})


def job(what: str, folder: Path) -> tuple[int, str]:
    process = start(what, folder)
    try:
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, said


def started(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """The ranks' process ids, once both have started."""
    files = [folder / "started-0", folder / "started-1"]
    limit = time.monotonic() + 20
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


def gone(pids: list[int]) -> bool:
    limit = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def test_all_is_well(tmp_path: Path) -> None:
    assert job("nothing", tmp_path) == (0, "")
    with pytest.raises(ConfigError, match="at least one rank"):
        launch(["true"], 0)


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("data", 3, "input.jsonl:3: the row is no good. Fix: mend it."),
        ("crash", 7, "rank 1 failed: unexpected ZeroDivisionError: a bug. Fix: rerun with --debug and report it."),
        ("kill", 7, "rank 1 was killed by SIGKILL. Fix: look at its last messages and free memory, then run again."),
        ("exit", 7, "rank 1 ended with exit code 9. Fix: look at its last messages and free memory, then run again."),
    ],
)
def test_the_rank_that_failed_speaks_for_all(tmp_path: Path, what: str, code: int, said: str) -> None:
    """Rank 0 ends first, because it has lost its peer."""
    assert job(what, tmp_path) == (code, f"error: {said}\n")


def test_torchrun_names_the_rank_that_failed_and_its_message(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", rank_toy.__file__]
    ended = subprocess.run([sys.executable, *words, "data", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1  # whatever its ranks say
    cause = ended.stderr[ended.stderr.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 3 " in cause, cause
    assert "DataError: error: input.jsonl:3: the row is no good. Fix: mend it." in cause


def test_a_rank_that_hangs_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = start("hang", tmp_path)
    pids = started(tmp_path, process)
    began = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 7 and said.startswith("error: in stage s: step 3: another rank failed or hangs")
    assert time.monotonic() - began < rank_toy.GRACE_S + 3 and gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_has_time_to_save_and_ends_with_75(tmp_path: Path, number: int) -> None:
    """The ranks take longer than `grace_s`, and longer than each other; the terminal's Ctrl-C goes to the group."""
    process = start("save", tmp_path)
    started(tmp_path, process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "error: stopped after step 5. Fix: run the same command again." in said
    assert said.count("error: ") == 1
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_a_job_whose_ranks_have_not_begun_ends_with_75(tmp_path: Path) -> None:
    process = start("importing", tmp_path)
    started(tmp_path, process)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (75, "error: stopped by SIGTERM. Fix: run the same command again to go on.\n")


def test_a_rank_that_waits_for_a_stopped_one_to_join_ends_too(tmp_path: Path) -> None:
    """torch waits for the rendezvous outside Python, where no handler of a signal runs."""
    process = start("joining", tmp_path)
    pids = started(tmp_path, process)
    time.sleep(1.0)  # rank 1 is in the rendezvous by now
    process.terminate()
    try:
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert said.count("error: ") == 1 and gone(pids)


def test_a_rank_that_loses_a_peer_because_it_stopped_is_no_failure() -> None:
    """Each of two ranks: it answered, it lost the other, or SIGTERM killed it before it could answer."""
    stopped = {"second": False, **pack_error(Stopped("stopped"))}
    lost = {"second": True, **pack_error(PeerError("another rank failed"))}

    def ended(code: int, left: dict | None, asked: bool) -> tuple[int, int]:
        """(priority, exit code), the lowest first."""
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(json.dumps(left).encode()[: None if left else 2])
        process = subprocess.Popen(["true"])
        process.wait()
        process.returncode = code
        found = _Rank(0, process, file).error(asked)
        file.close()
        return (99, 0) if found is None else (found[0], found[1].code)

    assert min(ended(75, stopped, True), ended(7, lost, True))[1] == 75
    assert min(ended(75, stopped, False), ended(7, lost, False))[1] == 7
    assert ended(-signal.SIGTERM, None, True)[1] == 75 and ended(-signal.SIGTERM, None, False)[1] == 7
    assert ended(0, None, True)[1] == 0 and ended(-signal.SIGKILL, None, True) < ended(75, stopped, True)


def test_ctrl_c_twice_kills_the_ranks(tmp_path: Path) -> None:
    process = start("deaf", tmp_path)
    pids = started(tmp_path, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 75 and "aborted by Ctrl-C" in said and gone(pids)


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    process = start("deaf", tmp_path, TMPDIR=str(tmp_path))
    pids = started(tmp_path, process)
    process.kill()
    process.communicate(timeout=10)
    assert gone(pids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started-0", "started-1"]  # and no temporary files


def test_a_job_that_asks_for_it_is_started_again(tmp_path: Path) -> None:
    code, said = job("again", tmp_path)
    assert code == 0 and said == "note: too large; starting the ranks again\n"


def test_a_real_run_of_two_ranks_stops_and_says_so_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM in the middle of a training stage: both ranks save the same step, and the command ends with 75."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny(tmp_path / "run", iterations=1)))
    words = ["--set=teachers.0.init.pretrain.epochs=1000", "--set=teachers.0.init.pretrain.save_every_steps=100000"]
    command = [sys.executable, "-m", "macpo.engine.train", str(recipe), *words]
    pid = forks.start(lambda: os._exit(run_cli(lambda: launch(command, 2))))
    try:
        limit = time.monotonic() + 90
        while not (found := list(tmp_path.glob("run/*/metrics.jsonl"))) or not found[0].read_text():
            assert time.monotonic() < limit and os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
    finally:
        os.kill(pid, signal.SIGTERM)
    assert forks.wait(pid) == 75
    said = capfd.readouterr().err
    (step,) = found[0].parent.glob("checkpoint/step-*")
    done = len(found[0].read_text().splitlines())
    assert step.name == f"step-{done:08d}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: stopped at base-teacher0. Fix: run the same command again to go on from here."]
