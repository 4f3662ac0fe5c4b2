"""The whole iteration beside today's pipeline: what its table says, and that nothing is done twice after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bench_iteration as bench
from bench.harness.measure import RESULTS
from bench.peers.pipeline import PARTS, Job

ROUNDS = [
    {"ours": dict.fromkeys(PARTS, mine), "theirs": dict.fromkeys(PARTS, other), "peak_bytes": [10**9, 3 * 10**9]}
    for mine, other in ((1.0, 4.0), (2.0, 6.0), (1.0, 8.0))
]


def test_what_was_made_before_a_kill_is_taken_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "model-0"
    assert bench.make_model("tiny", model, None, 0) == str(model) and not list(tmp_path.glob("*.part"))
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert bench.make_model("tiny", model, None, 0) == str(model)
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "found.json").write_text(json.dumps({"parts": {}}))
    assert bench.theirs(Job("no such run", "float32", "cpu", 1, {}), tmp_path) == {"parts": {}}
    (tmp_path / "found.json").unlink()
    with pytest.raises(RuntimeError, match="the rival ended with 1"):
        bench.theirs(Job(str(tmp_path / "no such run"), "float32", "cpu", 1, {}), tmp_path)


def test_ratios_are_of_the_same_round() -> None:
    assert bench.ratios(ROUNDS, None) == bench.ratios(ROUNDS, PARTS[0]) == [4.0, 3.0, 8.0]
    lines = bench.table({"rounds": ROUNDS, "best": dict.fromkeys(PARTS, 8)}).splitlines()
    assert lines[2] == f"| {PARTS[0]} | 1.0 | 6.0 | 4.00 [3.00, 8.00] | 8 |"
    assert lines[-1] == "Peak memory of the processes: 1.00 and 3.00 GB."


def test_results_that_differ_are_named() -> None:
    parts = {"scoring": {"checks": {"8": {"logp_error": 1e-3, "equal_share": 0.5}, "16": {"logp_error": 0.0}}}}
    assert bench.wrong("float32", parts) == [
        "scoring, 8: log-probs differ by 1.0e-03",
        "scoring, 8: 50.0% of the results differ",
    ]
    assert bench.wrong("bfloat16", parts) == []


def test_the_committed_results_are_exact() -> None:
    found = sorted(RESULTS.glob("*/iteration-*.json"))
    assert found
    for path in found:
        body = json.loads(path.read_text(encoding="utf-8"))
        assert len(body["rounds"]) >= 3 and not any(each["differs"] for each in body["rounds"]), path
