"""What a kill or a person leaves in a run's folder: half deletes, stray files, links, side files of any shape."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_run
from forks import forked

from macpo.engine import removal
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import RunFolder, read_timing
from macpo.engine.run.lock import LOCK
from macpo.engine.run.manifest import RUNNING, TIMING, Manifest
from macpo.engine.run.runner import RERUN, Runner
from macpo.engine.run.stages import Graph, Stage, StageWork

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """What waits for a FIFO is interrupted."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    Runner(folder, toy_run.build({}), log=lambda _: None).run()
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def run(folder: Path, graph: Graph | None = None, **more: Any) -> tuple[list[str], str]:
    """(stages that ran, what was logged)."""
    lines: list[str] = []
    return Runner(folder, graph or toy_run.build({}), log=lines.append, **more).run(), "\n".join(lines)


def text(content: str) -> Damage:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "x").write_text("x")


def link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


def absent(path: Path) -> None:
    path.unlink(missing_ok=True)


ODD: dict[str, Damage] = {
    "absent": absent,
    "fifo": fifo,
    "folder": folder,
    "link": link,
    "empty": text(""),
    "torn": text('{"seconds": 1, "cou'),
    "list": text("[1]"),
    "deep": text("[" * 100_000),
    "digits": text("9" * 5000),
    "nan": text('{"seconds": NaN, "counts": {"tokens": Infinity}}'),
    "text": text('{"seconds": "x", "counts": {"tokens": "many"}}'),
    "counts": text('{"seconds": 1, "counts": [1]}'),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_timing_of_any_shape_harms_nothing(done: Path, odd: str) -> None:
    """Of a finished stage whose result is read, and of one that goes on."""
    ODD[odd](done / "02-a1" / TIMING)
    shutil.rmtree(done / "04-join1")
    (done / "03-b1").rename(done / "03-b1.tmp")
    manifest = Manifest.read(done / "03-b1.tmp")
    (done / "03-b1.tmp" / "manifest.json").unlink()
    (done / "03-b1.tmp" / RUNNING).write_text(json.dumps({"key": manifest.key}))
    ODD[odd](done / "03-b1.tmp" / TIMING)
    assert {each.state for each in Runner(done, toy_run.build({})).status()} == {"done", "pending"}
    ran, said = run(done)
    assert ran == ["b1", "join1"] and (odd not in ("fifo", "folder", "link") or "02-a1/timing.json, which" in said)
    assert not os.path.lexists(done / "02-a1" / TIMING) or (done / "02-a1" / TIMING).is_file()
    assert Manifest.read(done / "03-b1").digest == manifest.digest
    assert set(read_timing(done / "03-b1")) == {"seconds", "counts"}


def test_an_ignored_timing_is_said_once(done: Path, caplog: pytest.LogCaptureFixture) -> None:
    (done / "02-a1" / TIMING).write_text("torn")
    for _ in range(2):
        Runner(done, toy_run.build({})).status()
    assert caplog.text.count("02-a1/timing.json is ignored: invalid JSON") == 1


@pytest.mark.parametrize("odd", [name for name in ODD if name != "absent"])
@pytest.mark.parametrize("name", [LOCK, RERUN])
def test_a_lock_or_note_of_any_shape_is_replaced(done: Path, name: str, odd: str) -> None:
    ODD[odd](done / name)
    assert all(each.state == "done" for each in Runner(done, toy_run.build({})).status())
    ran, said = run(done, from_stage="join2")
    assert ran == ["join2"] and not os.path.lexists(done / name) and Path("/etc/passwd").is_file()
    assert odd not in ("fifo", "folder", "link") or f"removed {done / name}" in said
    assert sorted(path.name for path in done.iterdir())[0] == "01-data" and len(list(done.iterdir())) == 7


@pytest.mark.parametrize("pid", [0, -1, 1e30, 10**30, 2**22 + 1, "text", True, None, [1]])
@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_lock_that_names_no_process_blocks_nobody(done: Path, pid: Any, host: str) -> None:
    (done / LOCK).write_text(json.dumps({"host": host, "pid": pid, "started": ""}))
    assert all(each.state == "done" for each in Runner(done, toy_run.build({})).status())
    ran, said = run(done)
    assert ran == [] and "which names no process" in said


UNHASHED: dict[str, Any] = {
    "list": [],
    "null": None,
    "created": {"created": [1], "mtime_ns": {}},
    "texts": {"created": {"version": 5, "commit": 5}, "mtime_ns": {"rows.jsonl": "x"}},
    "times": {"mtime_ns": 5},
    "more": {"created": {}, "mtime_ns": {}, "more": 1},
}


@pytest.mark.parametrize("shape", [*UNHASHED, "absent"])
def test_the_unhashed_part_of_a_manifest_may_have_any_shape(done: Path, shape: str) -> None:
    path = done / "02-a1" / "manifest.json"
    body = json.loads(path.read_text())
    if shape == "absent":
        del body["unhashed"]
    else:
        body["unhashed"] = UNHASHED[shape]
    path.write_text(json.dumps(body))
    shutil.rmtree(done / "04-join1")
    assert run(done)[0] == ["join1"]
    ran, said = run(done)
    assert ran == [] and (shape == "times" or "1 by an unknown version" in said or shape != "absent")


# What a stage leaves for the next attempt


class Learns(StageWork):
    """Dies in its first attempt, with a checkpoint, a log and what a library had half written."""

    name = "learns"
    scratch = ("checkpoint",)
    continued = ("metrics.jsonl",)

    def run(self, ctx: StageContext) -> None:
        ctx.note(attempts=ctx.counts.get("attempts", 0) + 1)
        found = sorted(path.name for path in ctx.dir.iterdir())
        (ctx.dir / "checkpoint").mkdir(exist_ok=True)
        (ctx.dir / "checkpoint" / "state").write_text("step 3")
        (ctx.dir / "policy").mkdir()
        if "checkpoint" not in found:
            (ctx.dir / "metrics.jsonl").write_text('{"step": 1}\n')
            for name in (".tmpAb12cd", "model-00002-of-00002.safetensors", "tmpx"):
                (ctx.dir / "policy" / name).write_text("half")
            (ctx.dir / "stray").symlink_to(ctx.dir.parent)
            raise ZeroDivisionError
        assert found == [RUNNING, "checkpoint", "metrics.jsonl", TIMING]
        (ctx.dir / "policy" / "model.safetensors").write_text("weights")


def learns() -> Graph:
    graph = Graph()
    graph.add(Stage("one", Learns()))
    return graph


@pytest.fixture
def half(tmp_path: Path) -> Path:
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", learns())
    return tmp_path / "run"


def files_of(run_dir: Path) -> list[str]:
    return sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if not path.is_dir())


COMMITTED = [f"01-one/{name}" for name in ("manifest.json", "metrics.jsonl", "policy/model.safetensors", TIMING)]


def test_a_resumed_stage_commits_only_what_it_wrote(half: Path) -> None:
    """So that its digest is that of an attempt that was never interrupted."""
    assert run(half, learns())[0] == ["one"]
    assert files_of(half) == COMMITTED
    assert set(Manifest.read(half / "01-one").files) == {"metrics.jsonl", "policy/model.safetensors"}


@pytest.mark.parametrize("place", ["checkpoint", "metrics.jsonl"])
@pytest.mark.parametrize("odd", [fifo, link])
def test_odd_things_in_the_place_of_what_goes_on_are_not_followed(half: Path, place: str, odd: Damage) -> None:
    path = half / "01-one.tmp" / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    odd(path)
    with pytest.raises((ZeroDivisionError, AssertionError)):  # it begins anew, or misses its log
        run(half, learns())
    assert Path("/etc/passwd").is_file() and not path.is_symlink()


@pytest.mark.parametrize("point", ["stage-manifest", "set-aside", "unlink", "stage-unmarked", "stage-renamed"])
def test_killed_while_the_checkpoint_is_deleted_the_stage_is_not_done_again(
    half: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest was there first, so no work is lost; nothing half deleted stays."""

    def dying() -> None:
        if point == "unlink":
            unlink = os.unlink

            def last_words(path: Any, **words: Any) -> None:
                unlink(path, **words)
                if path == "state":
                    os.kill(os.getpid(), signal.SIGKILL)

            os.unlink = last_words
        else:
            os.environ["MACPO_KILL_AT"] = f"{point}:{2 if point == 'set-aside' else 1}"
        run(half, learns())

    (half / "01-one.tmp" / "checkpoint" / "more").write_text("x")
    assert forked(dying) == -signal.SIGKILL
    ran = run(half, learns())[0]
    assert ran == ([] if point == "stage-renamed" else ["one"])
    assert read_timing(half / "01-one")["counts"] == {"attempts": 2}  # no third
    assert files_of(half) == COMMITTED


# Deletes


def test_a_killed_delete_leaves_nothing_under_the_old_name(tmp_path: Path) -> None:
    step = tmp_path / "step-00000003"
    step.mkdir()
    for name in ("a", "b", "manifest.json"):
        (step / name).write_text("x")

    def dying() -> None:
        unlink = os.unlink

        def last_words(path: Any, **words: Any) -> None:
            unlink(path, **words)
            os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = last_words
        removal.remove(step, tmp_path)

    assert forked(dying) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.trash"]
    assert len(list((tmp_path / "step-00000003.trash").iterdir())) == 2
    step.mkdir()  # made again, and deleted again, before anyone has swept
    removal.remove(step, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_and_fifos_in_a_run_folder_are_deleted_never_followed(done: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "waves.trash").mkdir(parents=True)
    key = Manifest.read(done / "04-join1").key
    for name in (".keep.1.part", "waves.trash/x", "manifest.txt"):
        (mine / name).write_text("mine")
    (mine / RUNNING).write_text(json.dumps({"key": key}))
    shutil.rmtree(done / "04-join1")
    (done / "04-join1.tmp").symlink_to(mine)
    (done / "cache").symlink_to(mine)
    (done / "trackers").symlink_to(mine)
    (done / "99-old.trash").symlink_to(mine)
    (done / LOCK).symlink_to(mine / "manifest.txt")
    os.mkfifo(done / "07-join2.tmp")
    shutil.rmtree(done / "07-join2")
    assert run(done)[0] == ["join1", "join2"]
    assert files_of(mine) == [".keep.1.part", RUNNING, "manifest.txt", "waves.trash/x"]
    assert (mine / "manifest.txt").read_text() == "mine"
    left = {path.name for path in done.iterdir()} - {"cache", "trackers"}
    assert len(left) == 7 and RunFolder(done).committed("join1") == done / "04-join1"


def test_a_folder_in_the_place_of_a_file_makes_way(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "summary.json").mkdir()
    removal.make_way(tmp_path / "summary.json", tmp_path, said.append)
    removal.make_way(tmp_path / "report.html", tmp_path, said.append)
    assert list(tmp_path.iterdir()) == [] and len(said) == 1 and "not a file that a run has written" in said[0]
