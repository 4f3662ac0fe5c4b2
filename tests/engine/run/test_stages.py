"""Stage graph, keys, manifests, staleness, status and locks in one process (faults 24, 25, 27, 33, 34, 35)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_run
from toy_run import From, MakeData, Transform

from macpo.engine.errors import ConfigError, IntegrityError, Stopped
from macpo.engine.run import manifest as manifests
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import RunFolder
from macpo.engine.run.lock import LOCK, Holder, RunLock, start_time
from macpo.engine.run.manifest import Manifest
from macpo.engine.run.runner import Runner
from macpo.engine.run.stages import Graph, Stage, StageWork

ALL = ["data", "a1", "b1", "join1", "a2", "b2", "join2"]


def run(folder: Path, config: dict[str, Any] | None = None, **more: Any) -> tuple[list[str], str]:
    """(stages that ran, what was logged)."""
    lines: list[str] = []
    graph = more.pop("graph", None) or toy_run.build(config or {})
    return Runner(folder, graph, log=lines.append, **more).run(), "\n".join(lines)


def digests(folder: Path) -> dict[str, str]:
    names = [path.name.partition("-")[2] for path in folder.glob("*-*")]
    return {name: Manifest.read(RunFolder(folder).committed(name) or folder).digest for name in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A finished run that the test may damage; time stamps survive the copy."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Run and resume


def test_a_run_and_its_folders(finished: Path) -> None:
    folders = sorted(path.name for path in finished.iterdir())
    assert folders == ["01-data", "02-a1", "03-b1", "04-join1", "05-a2", "06-b2", "07-join2"]
    body = json.loads((finished / "02-a1" / "manifest.json").read_text())
    assert set(body["files"]) == {"rows.jsonl", "model/weights.bin"}
    assert body["inputs"] == {"data": digests(finished)["data"]} and body["settings"] == {"i": 1, "salt": "s"}
    timing = json.loads((finished / "02-a1" / "timing.json").read_text())
    assert timing["counts"]["tokens"] == 6 and timing["seconds"] > 0
    assert (finished / "01-data" / "stage.log").read_text() == "6 rows\n"


def test_a_finished_run_is_left_alone_and_says_so(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    ran, said = run(done)
    assert ran == [] and said == "all 7 stages are done already, nothing to do (--from STAGE redoes some)"
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_progress_lines(tmp_path: Path) -> None:
    ran, said = run(tmp_path / "run")
    assert ran == ALL
    lines = said.splitlines()
    assert lines[1].startswith("[2/7] a1 done in ") and lines[1].endswith(" s (6 tokens)")
    assert [line.split()[1] for line in lines] == ALL


def test_logs_and_timings_stand_outside_the_result(done: Path) -> None:
    for name in ("timing.json", "stage.log", "model/timing.jsonl"):
        (done / "02-a1" / name).write_text("{}")
    assert run(done)[0] == []
    manifest = Manifest.read(done / "02-a1")
    manifest.verify(done / "02-a1", full=True)
    again = Manifest.of(done / "02-a1", "a1", manifest.kind, manifest.settings, manifest.inputs)
    assert again.digest == manifest.digest


def test_finished_stages_are_found_when_the_graph_grows(done: Path) -> None:
    ran, _ = run(done, {"extra": True})
    assert ran == ["extra"] and (done / "02-extra").is_dir() and (done / "02-a1").is_dir()
    assert run(done)[0] == [] and run(done, {"extra": True})[0] == []
    ran, _ = run(done, {"extra": True}, from_stage="join2")
    assert ran == ["join2"] and (done / "08-join2").is_dir() and not (done / "07-join2").exists()


class TwoSteps(StageWork):
    """Stops after its first step; a second attempt writes down what it found."""

    name = "two_steps"
    continued = ("half",)
    seed: int

    def run(self, ctx: StageContext) -> None:
        found = sorted(os.listdir(ctx.dir))
        if "TOY_STOP" in os.environ:
            (ctx.dir / "half").write_text("x")
            (ctx.dir / ".half.1.part").write_text("rubbish")
            raise Stopped("enough", "go on")
        (ctx.dir / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize(("seed", "found"), [(1, ["RUNNING", "half", "timing.json"]), (2, ["RUNNING"])])
def test_a_partial_folder_goes_on_if_its_key_is_the_same_and_is_wiped_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, found: list[str]
) -> None:
    def graph(seed: int) -> Graph:
        graph = Graph()
        graph.add(Stage("one", TwoSteps(seed=seed)))
        return graph

    monkeypatch.setenv("TOY_STOP", "1")
    with pytest.raises(Stopped):
        run(tmp_path, graph=graph(1))
    assert (tmp_path / "01-one.tmp" / "RUNNING").is_file()
    monkeypatch.delenv("TOY_STOP")
    run(tmp_path, graph=graph(seed))
    assert json.loads((tmp_path / "01-one" / "found.json").read_text()) == found
    assert not (tmp_path / "01-one" / "RUNNING").exists()


def test_interrupted_time_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAIL", "a1:crash")
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path / "run")
    assert caught.value.__notes__ == ["in stage a1"]
    timing = tmp_path / "run" / "02-a1.tmp" / "timing.json"
    timing.write_text(json.dumps({"seconds": 100.0, "counts": {}}))
    monkeypatch.delenv("TOY_FAIL")
    assert run(tmp_path / "run")[0] == ALL[1:]
    assert {s.name: s.seconds for s in Runner(tmp_path / "run", toy_run.build({})).status()}["a1"] > 100


# Stale


def test_a_changed_setting_names_the_field_and_the_stale_stages(done: Path) -> None:
    before = digests(done)
    with pytest.raises(ConfigError) as caught:
        run(done, {"salt": "new"})
    text = str(caught.value)
    assert 'changed since a1 was done: salt: "s" -> "new"' in text
    assert "this makes 5 finished stages stale: a1, join1, a2, b2, join2" in text
    assert "--rerun-stale or --from a1" in text
    assert digests(done) == before


def test_rerun_stale_redoes_what_changed_and_from_needs_to_reach_it(done: Path, tmp_path: Path) -> None:
    run(tmp_path / "clean", {"salt": "new"})
    with pytest.raises(ConfigError, match="changed since a1"):
        run(done, {"salt": "new"}, from_stage="join1")
    ran, said = run(done, {"salt": "new"}, rerun_stale=True)
    assert ran == ["a1", "join1", "a2", "b2", "join2"]
    assert 'a1 is redone: salt: "s" -> "new"' in said
    assert digests(done) == digests(tmp_path / "clean")
    assert run(done, {"salt": "new"})[0] == []


def test_a_redone_stage_with_the_same_outputs_keeps_what_follows(tmp_path: Path) -> None:
    def graph(note: str) -> Graph:
        graph = Graph()
        rows = graph.add(Stage("rows", MakeData(seed=1, num_rows=3, note=note)))
        graph.add(Stage("next", Transform(salt="s", inputs=From(rows=rows))))
        return graph

    run(tmp_path / "run", graph=graph("a"))
    assert run(tmp_path / "run", graph=graph("b"), rerun_stale=True)[0] == ["rows"]


def test_from_redoes_a_stage_and_all_that_follows(done: Path) -> None:
    before = digests(done)
    (done / "06-b2" / "rows.jsonl").write_text("damaged, and about to be redone")
    assert run(done, from_stage="join1")[0] == ["join1", "a2", "b2", "join2"]
    assert digests(done) == before
    with pytest.raises(ConfigError, match="did you mean 'join1'"):
        run(done, from_stage="jion1")


def test_an_interrupted_from_goes_on_instead_of_starting_over(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAIL", "b2:crash")
    with pytest.raises(ZeroDivisionError):
        run(done, from_stage="join1")
    monkeypatch.delenv("TOY_FAIL")
    ran, said = run(done, from_stage="join1")
    assert ran == ["b2", "join2"] and "resuming the rerun from join1" in said
    assert run(done, from_stage="join1")[0] == ["join1", "a2", "b2", "join2"]


def test_changed_code_is_a_warning(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("macpo.engine.run.status.code_version", lambda: {"version": "9.9", "commit": "f" * 40})
    ran, said = run(done)
    assert ran == [] and "warning: the code is 9.9@ffffffffff, finished stages were made 7 by" in said


def test_a_deleted_stage_is_redone_and_what_follows_is_kept(done: Path) -> None:
    before = digests(done)
    shutil.rmtree(done / "02-a1")
    assert run(done)[0] == ["a1"] and digests(done) == before


# Damage


def test_damage_is_found_when_the_stage_is_used(done: Path) -> None:
    """A flipped bit under the old size and time stamp: only the full hash at consumption can see it."""
    path = done / "02-a1" / "model" / "weights.bin"
    stamp = path.stat()
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run(done)[0] == []  # nothing consumes it
    shutil.rmtree(done / "04-join1")
    with pytest.raises(IntegrityError) as caught:
        run(done)
    text = str(caught.value)
    assert "the content of model/weights.bin was changed" in text
    assert f"delete {done / '02-a1'} or run with --from a1" in text and caught.value.code == 5
    assert run(done, from_stage="a1")[0] == ["a1", "join1", "a2", "b2", "join2"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "rows.jsonl").unlink(), "rows.jsonl is missing"),
        (lambda f: os.truncate(f / "rows.jsonl", 100), "rows.jsonl has 100 bytes instead of 1,782"),
        (lambda f: (f / "rows.jsonl").write_bytes(b"x" * 1782), "the content of rows.jsonl was changed"),
        (lambda f: shutil.rmtree(f / "model"), "model/weights.bin is missing"),
        (lambda f: ((f / "rows.jsonl").unlink(), (f / "rows.jsonl").symlink_to("/etc/passwd")), "not a regular file"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest"),
        (lambda f: os.truncate(f / "manifest.json", 50), "its manifest is unreadable: invalid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "its manifest lacks entries"),
        (lambda f: edit(f, lambda m: m["settings"].update(salt="x")), "its manifest was edited"),
        (lambda f: edit(f, lambda m: m["files"].pop("rows.jsonl")), "its manifest was edited"),
        (lambda f: edit(f, lambda m: m.pop("inputs")), "its manifest lacks entries"),
        (lambda f: edit(f, lambda m: m.update(schema=99)), "the manifest has schema 99, this version of macpo reads 2"),
    ],
)
def test_visible_damage_stops_a_run_at_once(done: Path, damage: Any, message: str) -> None:
    damage(done / "02-a1")
    with pytest.raises(IntegrityError) as caught:
        run(done)
    assert message in str(caught.value) and "02-a1" in str(caught.value) and "Fix:" in str(caught.value)
    status = {each.name: each for each in Runner(done, toy_run.build({})).status()}
    assert status["a1"].state == "damaged" and status["join1"].state == "stale" and status["b1"].state == "done"


def edit(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_a_manifest_cannot_point_outside_its_folder(done: Path) -> None:
    def escape(body: dict) -> None:
        body["files"]["../../secret"] = {"bytes": 1, "sha256": "0" * 64}
        body["digest"] = manifests.digest_of(body["files"])

    edit(done / "02-a1", escape)
    with pytest.raises(IntegrityError, match="was edited"):
        run(done)


def test_a_file_that_does_not_belong_is_found_at_consumption(done: Path) -> None:
    (done / "02-a1" / "model" / "shard-7.safetensors").write_bytes(b"old")
    (done / "02-a1" / ".DS_Store").write_bytes(b"harmless")
    shutil.rmtree(done / "04-join1")
    with pytest.raises(IntegrityError, match=r"model/shard-7.safetensors does not belong to it. Fix: delete"):
        run(done)
    (done / "02-a1" / "model" / "shard-7.safetensors").unlink()
    assert run(done)[0] == ["join1"]


def test_a_copied_run_with_new_time_stamps_is_fine(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copyfile))
    assert run(copy)[0] == []


class Link(StageWork):
    name = "link"

    def run(self, ctx: StageContext) -> None:
        (ctx.dir / "link").symlink_to("/etc/passwd")


def test_a_stage_may_not_write_links(tmp_path: Path) -> None:
    graph = Graph()
    graph.add(Stage("one", Link()))
    with pytest.raises(IntegrityError, match="not a regular file"):
        run(tmp_path / "run", graph=graph)


def test_two_folders_for_one_stage(done: Path) -> None:
    shutil.copytree(done / "02-a1", done / "09-a1")
    with pytest.raises(IntegrityError, match=r"02-a1 and 09-a1 are the same stage. Fix: delete one"):
        run(done)


# Status, locks, places


def test_status_says_why(done: Path, tmp_path: Path) -> None:
    assert [s.state for s in Runner(tmp_path / "none", toy_run.build({})).status()] == ["pending"] * 7
    found = Runner(done, toy_run.build({"salt": "new"})).status()
    assert [s.state for s in found] == ["done", "stale", "done", "stale", "stale", "stale", "stale"]
    assert found[1].why == 'salt: "s" -> "new"' and found[3].why == "comes after a1"
    assert found[0].folder == "01-data" and found[0].seconds is not None and found[1].counts["tokens"] == 6
    (done / "07-join2").rename(done / "07-join2.tmp")
    assert Runner(done, toy_run.build({})).status()[6].why == "interrupted, goes on from where it was"
    with RunLock(done, print):
        assert Runner(done, toy_run.build({})).status()[6].state == "running"


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_the_same_folder_is_refused(done: Path, sleeper: subprocess.Popen) -> None:
    other = Holder(socket.gethostname(), sleeper.pid, start_time(sleeper.pid))
    (done / LOCK).write_text(json.dumps(vars(other)))
    with pytest.raises(ConfigError, match=f"in use by process {sleeper.pid} on {socket.gethostname()}"):
        run(done)
    with RunLock(done.parent, print), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunLock(done.parent, print).__enter__()


def test_stale_locks_are_cleared_with_a_line(done: Path, sleeper: subprocess.Popen) -> None:
    host = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for holder in (Holder(host, dead.pid, start_time(os.getpid())), Holder(host, sleeper.pid, "other-boot:1")):
        (done / LOCK).write_text(json.dumps(vars(holder)))
        assert f"cleared the lock that process {holder.pid} on {host} left behind" in run(done)[1]
        assert not (done / LOCK).exists()
    for torn in ("", '{"host"', "[]"):
        (done / LOCK).write_text(torn)
        assert run(done)[0] == []
    (done / LOCK).write_text(json.dumps(vars(Holder("elsewhere", dead.pid, "x"))))
    with pytest.raises(ConfigError, match="on elsewhere"):
        run(done)


def test_an_unwritable_output_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ConfigError, match="cannot write into the output folder") as caught:
            run(bad)
        assert caught.value.code == 2
