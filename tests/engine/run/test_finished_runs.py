"""Runs that an earlier version finished stay finished, whatever has moved in the code since.

`data/finished-runs.tar.xz` holds three small runs made by commit f0cee2b (manifests of schema 1) from a file of pairs:
the whole method with a LoRA and a fully trained teacher, ceiling and an ablation; `recipe: preference`; `recipe: sft`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import macpo
from standalone_runs import unpack_runs

STAGES = {"macpo": 50, "preference": 6, "sft": 5}
AGENT = {"macpo": "student", "preference": "policy", "sft": "policy"}


@pytest.fixture(scope="module", params=STAGES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, at `runs/KIND` below the working folder, as its recipe says."""
    return unpack_runs(tmp_path_factory.mktemp("finished")) / str(request.param)


def committed(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.glob("[0-9]*/**/*") if p.is_file()}


def test_the_runs_are_of_the_first_schema(run: Path) -> None:
    manifests = [json.loads(path.read_text()) for path in run.glob("*/manifest.json")]
    assert len(manifests) == STAGES[run.name] and {m["schema"] for m in manifests} == {1}
    assert {m["unhashed"]["created"]["commit"][:7] for m in manifests} == {"f0cee2b"}
    assert all(m["kind"].count(".") == 2 for m in manifests)


def test_status_run_report_and_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parents[1])
    before = committed(run)

    assert macpo("status", run) == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done"] * STAGES[run.name]

    summary = json.loads((run / "summary.json").read_text())
    assert macpo("run", run) == 0
    assert f"all {STAGES[run.name]} stages are done already, nothing to do" in capsys.readouterr().err
    again = json.loads((run / "summary.json").read_text())
    assert again["agents"] == summary["agents"] and again["stages"] == summary["stages"]

    assert macpo("report", run) == 0
    assert (run / "report.html").stat().st_size > 10_000
    assert macpo("export", run, "--agent", AGENT[run.name], "--out", tmp_path / "exported") == 0
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
    assert committed(run) == before


def test_an_edited_manifest_of_the_first_schema_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parents[1])
    (run.parents[1] / "pairs.jsonl").write_bytes((run.parent / "pairs.jsonl").read_bytes())  # what is not done needs it
    path = next(run.glob("01-*/manifest.json"))
    whole = path.read_text()
    path.write_text(whole.replace('"kind": "macpo.', '"kind": "other.'))
    try:
        assert macpo("run", run) == 5
        assert "its manifest was edited" in capsys.readouterr().err
    finally:
        path.write_text(whole)
        (run.parents[1] / "pairs.jsonl").unlink()
