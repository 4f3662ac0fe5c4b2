"""The suite of a GPU's measurements: what its parts name exists, nothing outlives a part, a kill loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import bench_train_step, gpu_suite, tune
from bench.gpu import guard, machine
from bench.gpu.parts import KERNEL_TESTS, MINUTES, NEW_TESTS, Part, all_parts, listing
from bench.gpu.publish import publish
from bench.gpu.store import ARCHIVE, DONE, Outcome, Store
from bench.gpu.summary import table
from bench.harness.pytest_report import merged

ROOT = Path(__file__).resolve().parents[2]
SUITE = [sys.executable, "-m", "bench.gpu_suite"]


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waited for by nobody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_default_parts_fit_into_one_call() -> None:
    parts = all_parts()
    assert len({part.name for part in parts}) == len({part.result for part in parts}) == len(parts)
    assert sum(part.seconds for part in parts if not part.extra) <= MINUTES * 60 <= 9.3 * 60
    assert [part.extra for part in parts] == sorted(part.extra for part in parts), "what may be left out comes last"
    assert parts[0].name == "tests" and listing(parts).endswith("extra ones run in the time that is left")
    assert all(part.small or part.why_cuda for part in parts)


def test_every_test_that_needs_a_gpu_is_in_the_suite() -> None:
    """Files that skip a test without CUDA, or run the Triton kernels on a GPU where there is one."""
    needs_gpu = re.compile(r"skipif\(not torch\.cuda\.is_available\(\)|kernel_checks import .*\b(DEVICE|TRITON)\b")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__)]
    found = {path.relative_to(ROOT).as_posix() for path in files if needs_gpu.search(path.read_text())}
    assert found == {*NEW_TESTS, *KERNEL_TESTS}


def test_every_case_that_a_part_asks_for_exists() -> None:
    cases = {case.name for case in (*bench_train_step.CASES["gpu"], *bench_train_step.CASES["small"])}
    rivals = [rival.name for rival in bench_train_step.CASES["gpu"][0].rivals]
    for part in all_parts():
        script = import_module(part.command[1]) if part.name != "tests" else None
        if script is bench_train_step:
            for command in (part.command, part.small):
                assert any(option(command, "--only") in name for name in cases)
                assert option(command, "--rivals") == "none" or any(option(command, "--rivals") in r for r in rivals)
        elif script is tune:
            assert tune.trials([option(part.command, "--part")])
        elif "--only" in part.command:
            specs = import_module(part.command[1]).specs("gpu", torch.device("cpu"))
            only = option(part.command, "--only").split(",")
            assert all(any(word in spec.name for spec in specs) for word in only), part.name


# --- the guard ------------------------------------------------------------------------------------------------------

# Starts a process in the same group and one in a session of its own, as compilers' worker pools do, and writes who.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid, os.getpid()]
open(sys.argv[1] + ".tmp", "w").write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(float(sys.argv[2]))
raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("seconds", "sleep", "close", "status"),
    [("30", "0", False, 3), ("0.5", "600", False, guard.TIMED_OUT), ("60", "600", True, guard.TOLD_TO_STOP)],
    ids=["ends by itself", "out of time", "the suite is gone"],
)
def test_nothing_outlives_a_part(seconds: str, sleep: str, close: bool, status: int, tmp_path: Path) -> None:
    """Whatever ends it, its children are dead when the guard returns, also those of another session."""
    path = tmp_path / "pids"
    command = [sys.executable, guard.__file__, seconds, sys.executable, "-c", FAMILY, str(path), sleep]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if close:
        until(path.exists)
        assert process.stdin is not None
        process.stdin.close()
    assert process.wait(60) == status
    if path.exists():  # half a second may be too short for a start
        assert not [pid for pid in map(int, path.read_text().split()) if alive(pid)]
    else:
        assert status == guard.TIMED_OUT


# --- kill and resume ------------------------------------------------------------------------------------------------

# A suite in the real runner, of the scripts that it is given.
TOY = """
import os, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory
from bench import gpu_suite
from bench.gpu import runner
from bench.gpu.parts import Part
from bench.gpu.store import Store
out, resume, *scripts = sys.argv[1:]
parts = [Part(Path(script).stem, 60, "", (), (script, "{out}")) for script in scripts]
runner.BUNDLE_S = 0.2
with TemporaryDirectory() as work:
    store = Store(Path(out), Path(work), Path(resume) if resume else None)
    todo = gpu_suite.plan(parts, store, True, "code")
    runner.Runner(store, dict(os.environ), [sys.executable], "", time.monotonic() + 120).run(todo, 1)
"""
RAN = """
import os, sys, time
print("ran", flush=True)
open(sys.argv[1] + "/result.json", "w").write("{}")
"""


def members(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        files = {info.name: tar.extractfile(info) for info in tar.getmembers() if info.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


def statuses(archive: Path) -> dict[str, str]:
    held = members(archive)
    return {
        name.split("/")[0]: json.loads(text)["status"]
        for name, text in held.items()
        if name.endswith("part.json") and ".earlier" not in name
    }


def test_a_killed_suite_leaves_no_process_and_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL while the last part runs: a resumed call, elsewhere, runs that part and the failed one, not the first."""
    first, second, go = tmp_path / "one", tmp_path / "two", tmp_path / "go"
    wait = f"print('waits', os.getpid(), flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(.05)"
    scripts = []
    for name, then in (("first", ""), ("wrong", "raise SystemExit(5)"), ("last", wait)):
        scripts.append(str(tmp_path / f"{name}.py"))
        Path(scripts[-1]).write_text(RAN + then)
    command = [sys.executable, "-c", TOY]
    process = subprocess.Popen([*command, str(first), "", *scripts], cwd=ROOT, stdout=subprocess.DEVNULL)
    until(lambda: (first / ARCHIVE).exists() and "waits" in members(first / ARCHIVE).get("last/log", ""))
    held = members(first / ARCHIVE)
    assert statuses(first / ARCHIVE) == {"first": "done", "wrong": "exit 5", "last": "running"}
    assert held["wrong/log"] == "ran\n" and "last/result.json" in held
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    pid = int(held["last/log"].split()[-1])
    until(lambda: not alive(pid))
    assert [path.name for path in first.iterdir()] == [ARCHIVE], "one file, whole"

    go.touch()
    again = subprocess.run(
        [*command, str(second), str(first / ARCHIVE), *scripts], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "== first: done before" in again.stdout and "== last: done" in again.stdout
    assert "== wrong: exit 5" in again.stdout and "   | ran" in again.stdout, "its output tail is shown"
    held = members(second / ARCHIVE)
    assert statuses(second / ARCHIVE) == {"first": "done", "wrong": "exit 5", "last": "done"}
    assert held["first/log"] == "ran\n" and "wrong.earlier/log" in held and "last.earlier/log" not in held


def test_results_of_other_code_or_sizes_are_not_taken_over(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", tmp_path / "work")
    store.begin(Outcome("part", "running", "a", small=False))
    assert not store.finished("part", "a", small=False)
    store.write(Outcome("part", DONE, "a", small=False))
    assert store.finished("part", "a", small=False)
    assert not store.finished("part", "b", small=False) and not store.finished("part", "a", small=True)


# --- the whole suite at small sizes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The archive of a dry run, what was printed, and the CPU seconds of the suite without its parts."""
    before = os.times()
    out = tmp_path_factory.mktemp("dry")
    done = subprocess.run(
        [*SUITE, "--dry-run", "--data", "generated", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return out / ARCHIVE, done.stdout, spent


def test_the_dry_run_takes_every_part_to_its_end(dry: tuple[Path, str, float]) -> None:
    archive, shown, _ = dry
    held, parts = members(archive), all_parts()
    found = statuses(archive)
    assert found == {part.name: "done" if part.small else "skipped" for part in parts}
    assert [path.name for path in archive.parent.iterdir()] == [ARCHIVE] and archive.stat().st_size < 100_000
    for part in parts:
        outcome = json.loads(held[f"{part.name}/part.json"])
        assert outcome["small"] and (outcome["reason"].startswith("needs CUDA: ") == (not part.small))
        results = [name for name in held if name.startswith(f"{part.name}/") and name.endswith(".json")]
        assert len(results) == 1 + bool(part.small), part.name
    tests = json.loads(held["tests/tests.json"])
    assert "passed" in tests["tests"] and not tests["failed"] and tests["device"].startswith("CPU")
    *_, last = shown.strip().splitlines()
    assert last.startswith(f"{sum(bool(part.small) for part in parts)} of {len(parts)} parts done; tune_")
    after = shown.partition("==== summary")[2]
    assert all(f"\n{part.name}: " in after for part in parts) and "pairs: generated" in after


def test_two_cores_need_at_most_90_seconds_for_the_dry_run(dry: tuple[Path, str, float]) -> None:
    """By the processors' time, which other work on the machine changes little."""
    logs = [text for name, text in members(dry[0]).items() if name.endswith("/log")]
    spent = [float(match) for text in logs for match in re.findall(r"^\[([\d.]+) s of CPU time\]$", text, re.MULTILINE)]
    assert len(spent) == sum(bool(part.small) for part in all_parts())
    assert dry[2] + sum(spent) < 2 * 90, (dry[2], spent)


def test_a_finished_archive_runs_nothing_again_and_small_sizes_are_no_results(
    dry: tuple[Path, str, float], tmp_path: Path
) -> None:
    command = [*SUITE, "--dry-run", "--data", "generated", "--out", str(tmp_path), "--resume", str(dry[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count(": done before") == sum(bool(part.small) for part in all_parts())
    assert done.stdout.partition("==== summary")[2] == dry[1].partition("==== summary")[2]
    with pytest.raises(ValueError, match="not at real sizes"):
        publish(dry[0], all_parts(), tmp_path)
    refused = subprocess.run([*SUITE, "--publish", str(dry[0])], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")


# --- results, machines ----------------------------------------------------------------------------------------------


def test_an_archive_becomes_small_result_files(tmp_path: Path) -> None:
    """Whose tests passed: one file a part that left results, in the device's folder; a failed part is in the table."""
    parts = [Part("tests", 9, "", (), result="tests"), Part("losses", 9, "", (), result="pair_loss")]
    store = Store(tmp_path / "out", tmp_path / "work")
    body = {"device": "NVIDIA H200", "tests": "3 passed", "failed": [], "skipped": {}, "running": []}
    for part, status in zip(parts, (DONE, "out of time"), strict=True):
        folder = store.begin(Outcome(part.name, "running", "a", small=False, limit=9))
        (folder / "x.json").write_text(json.dumps(body))
        (folder / "log").write_text("x" * 200_000)
        store.write(Outcome(part.name, status, "a", small=False, limit=9, seconds=8.8))
    store.bundle()
    assert store.archive.stat().st_size < 5000 and (store.work / "losses" / "log").stat().st_size == 100_000
    written = publish(store.archive, parts, tmp_path / "results")
    names = [path.relative_to(tmp_path / "results").as_posix() for path in written]
    assert names == ["nvidia-h200/tests.json", "nvidia-h200/pair_loss.json"]
    assert json.loads(written[1].read_text()) == body
    lines = list(table(store, parts))
    assert "losses: out of time in 9 of 9 s" in lines and lines[-1] == "1 of 2 parts done; losses: out of time"
    store.write(Outcome("tests", "exit 1", "a", small=False))
    store.bundle()
    with pytest.raises(ValueError, match="tests: exit 1"):
        publish(store.archive, parts, tmp_path / "results")


def test_what_a_bare_machine_lacks_is_said_and_not_fatal(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", tmp_path / "work")
    parts = [Part("rival", 9, "", (), ("-c", "0"), needs=("no_such_module",)), Part("ours", 9, "", (), ("-c", "0"))]
    todo = gpu_suite.plan(parts, store, True, "code")
    assert [outcome.reason for _, outcome in todo] == ["not installed: no_such_module", ""]


def test_a_checkout_that_is_not_installed_runs_from_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_installed", lambda: False)
    environment = machine.environment(tmp_path)
    code = "import macpo.kernels, macpo.engine, macpo.cli, bench; print(macpo.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "macpo" / "kernels" / "__init__.py")


def test_tests_that_were_running_when_it_ended_are_named() -> None:
    shard = {
        "outcomes": {"passed": 2},
        "failed": [],
        "skipped": {"a": 1},
        "seconds": {"t": 1.0},
        "running": "",
        "ended": 1,
    }
    hung = {**shard, "running": "tests/x.py::test_hangs", "ended": 0}
    body = merged([shard, hung], 3)
    assert body["tests"] == "4 passed; 2 of 3 processes did not end" and body["running"] == ["tests/x.py::test_hangs"]
    assert body["skipped"] == {"a": 2}
