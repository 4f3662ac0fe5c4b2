"""The benchmarks: each script end to end at toy sizes, what a result file holds, and that wrong peers do not count."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields
from importlib import import_module

import pytest
import torch

from bench import run_all
from bench.harness import device, measure, memory
from bench.harness.measure import Case, Peer, Result
from bench.harness.options import Spec, run_bench
from bench.inputs import heads

CPU = torch.device("cpu")
# Peers that start quickly: nothing compiled.
FAST = {
    "pair_loss": "eager,TRL,FLCE",
    "linear_logp": "eager,F.linear",
    "prefix_attention": "torch backend,padded,flash",
    "paged_attention": "torch,SDPA,flash",
    "sampling": "torch backend,reference,HF,multinomial,flashinfer",
}


def check_file(body: dict) -> None:
    """What every result file holds."""
    assert body["device"].startswith("CPU ") and body["threads"] == torch.get_num_threads()
    assert {"torch", "python"} <= set(body["versions"])
    assert isinstance(body["commit"], str) and body["date"].endswith("+00:00") and body["skipped"] == []
    assert body["cases"]
    for case in body["cases"]:
        assert case["shape"] and case["name"] and case["ceiling"] and (case["flop"] > 0) != (case["bytes"] > 0)
        ours = case["results"][0]
        assert ours["peer"].startswith("macpo") and ours["status"] == "exact" and ours["times_ours"] == 1.0
        for result in case["results"]:
            assert set(result) == {field.name for field in fields(Result)}
            if result["status"] == "absent":
                assert result["reason"] and result["median_ms"] is None
                continue
            assert result["status"] in ("exact", "inexact")
            assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"] and result["rounds"] in (2, 3)
            assert result["floor_units"] > 0 and result["share_of_ceiling"] > 0
            rate = result["tflop_per_s"] if case["flop"] else result["gb_per_s"]
            work = case["flop"] / 1e12 if case["flop"] else case["bytes"] / 1e9
            if not result["peer"].startswith("("):
                assert rate == pytest.approx(work / (result["median_ms"] / 1e3))
                assert result["peak_extra_bytes"] >= 0 and result["returned_bytes"] > 0
                assert max(result["errors"].values()) <= 10 * measure.EXACT[getattr(torch, case["dtype"])]


@pytest.mark.parametrize("name", run_all.PARTS)
def test_every_script_runs_end_to_end(name, tmp_path, capsys):
    module = import_module(f"bench.bench_{name}")
    options = ["--shapes", "small", "--device", "cpu", "--repeats", "3", "--peers", FAST[name]]
    path = run_bench(name, module.specs, module.__doc__, [*options, "--json-dir", str(tmp_path)])
    assert path == tmp_path / f"{name}.json"
    body = json.loads(path.read_text())
    check_file(body)
    assert len(body["cases"]) == len(module.specs("small", CPU))
    shown = capsys.readouterr().out
    peers = {result["peer"] for case in body["cases"] for result in case["results"]}
    assert len(peers) > 2 and all(peer in shown for peer in peers)
    assert module.OURS in peers and set(module.PEERS) >= {peer for peer in peers if not peer.startswith("(")}
    table = "\n".join(run_all.summary(tmp_path, {}))
    assert all(case["name"] in table for case in body["cases"])
    assert all(f"{other}: no result" in table for other in run_all.PARTS if other != name)
    assert f"{name}: stopped" in "\n".join(run_all.summary(tmp_path, {name: "stopped"}))


def test_gpu_cases_are_those_that_the_targets_name():
    """Made only on a GPU; here their names, and that no two cases share one."""
    found = {}
    for name in run_all.PARTS:
        for shapes in ("small", "issue", "gpu"):
            names = [spec.name for spec in import_module(f"bench.bench_{name}").specs(shapes, CPU)]
            assert len(set(names)) == len(names) > 0
            found[name] = names
    for rows, hidden in ((4096, 4096), (8192, 4096), (4096, 2048)):
        for head in ("frozen", "trainable"):
            assert f"N{rows} H{hidden} V128256 bf16 text {head}" in found["pair_loss"]
        assert f"N{rows} H{hidden} V128256 bf16 text score" in found["linear_logp"]
    for batch, context in ((256, 300), (256, 4096)):
        assert any(name.startswith(f"B{batch} context{context} ") for name in found["paged_attention"])
    assert {"B256 V128256 temperature", "B256 V128256 top-k50 top-p0.7"} <= set(found["sampling"])
    assert {"hh64", "8k-prompt"} == {name.split()[0] for name in found["prefix_attention"]}


def test_a_case_that_cannot_be_made_costs_itself_alone(tmp_path, capsys):
    """Out of memory, say: the others are measured and written, and the script fails at its end."""

    def specs(shapes, device):
        def broken():
            raise MemoryError("too large")

        right = torch.arange(1.0, 9.0)
        return [Spec("broken", broken), Spec("toy", lambda: toy_case([giving("ours", right)]))]

    options = ["--shapes", "small", "--device", "cpu", "--repeats", "2", "--json-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: broken"):
        run_bench("toy", specs, "", options)
    body = json.loads((tmp_path / "toy.json").read_text())
    assert [case["name"] for case in body["cases"]] == ["toy"] and body["skipped"] == ["broken"]
    assert "MemoryError: too large" in capsys.readouterr().err


def toy_case(peers: list[Peer]) -> Case:
    expected = torch.arange(1.0, 9.0, dtype=torch.float64)
    return Case("toy", {"n": 8}, torch.float32, CPU, peers, {"out": expected}, flop=8.0)


def giving(name: str, value) -> Peer:
    return Peer(name, lambda: lambda: {"out": value})


def test_wrong_and_absent_peers_are_not_timed():
    right = torch.arange(1.0, 9.0)

    def missing():
        raise measure.Unavailable("not installed")

    def broken():
        return {"out": right[100]}

    peers = [
        giving("ours", right),
        giving("rounded", right * (1 + 5e-5)),
        giving("off by a percent", right * 1.01),
        giving("not a number", right * math.nan),
        giving("misshapen", right[:, None]),
        Peer("silent", lambda: lambda: {}),
        Peer("missing", missing),
        Peer("broken", lambda: broken),
        Peer("variant", lambda: lambda: {"out": right * 2}, reference={"out": right.double() * 2}),
        Peer("padded", lambda: lambda: {"out": torch.cat([right, right])}, view=lambda o: {"out": o["out"][:8]}),
    ]
    results = {result.peer: result for result in measure.measure(toy_case(peers), repeats=2, budget_s=60.0)}
    status = {name: result.status for name, result in results.items()}
    wrong = {name for name, what in status.items() if what == "wrong"}
    assert wrong == {"off by a percent", "not a number", "misshapen", "silent"}
    assert {name for name, what in status.items() if what == "absent"} == {"missing", "broken"}
    assert status["rounded"] == "inexact" and status["ours"] == status["variant"] == status["padded"] == "exact"
    assert results["off by a percent"].reason == "error 1.0e-02" and results["missing"].reason == "not installed"
    assert results["broken"].reason.startswith("IndexError: ")
    for name, what in status.items():
        assert (results[name].median_ms is not None) == (what in ("exact", "inexact")), name
    text = [measure.row_text(result) for result in results.values()]
    assert any("wrong: error 1.0e-02" in line for line in text) and any(
        "absent: not installed" in line for line in text
    )
    assert json.dumps(measure.finite({"a": [results["not a number"].error, math.inf]}), allow_nan=False)


def test_peers_beyond_the_budget_are_named():
    right = torch.arange(1.0, 9.0)
    slow = Peer("ours", lambda: lambda: time.sleep(0.05) or {"out": right})
    results = measure.measure(toy_case([slow, giving("second", right)]), repeats=1, budget_s=0.02)
    assert [result.status for result in results] == ["exact", "absent"] and "time" in results[1].reason


def test_a_wrong_draw_is_caught():
    """Samplers are checked by what may be drawn, and by the log-probs that they return."""
    sampling = import_module("bench.bench_sampling")
    case = sampling.make_case(5, 97, "top-k50 top-p0.7", CPU)
    outputs = dict(case.peers[0].build()())
    assert case.check(outputs) < 1e-5
    assert case.check({**outputs, "raw": outputs["raw"] * 1.01}) > 1e-3
    outside = (~case.check.allowed).int().argmax(1)
    assert case.check({"ids": outside}) == math.inf
    assert case.check({"ids": outputs["ids"], "probs": torch.full((5, 97), 1 / 97)}) > 0.1


def test_rounds_take_turns_and_stop_at_the_budget():
    order = []
    runs = {name: lambda name=name: order.append(name) or {} for name in "abc"}
    runs["late"] = lambda: time.sleep(0.02) or {}
    calls = {"a": 2, "b": 1, "c": 1, "late": 1}
    taken = measure.rounds_of(runs, calls, CPU, repeats=4, budget_s=60.0, ours="b")
    assert "".join(order[:8]) == "aabcbcaa"  # a is called twice a round
    # a, b and c take microseconds, so any of them may be dropped; the slow one always is.
    assert len(taken["b"]) == 4 and len(taken["late"]) == 2
    assert len(measure.rounds_of(runs, calls, CPU, repeats=50, budget_s=0.0, ours="b")["a"]) == 2


def test_memory_leaves_out_what_is_returned_and_what_was_there():
    before = torch.zeros(2**18)  # 1 MiB

    def run():
        returned = torch.zeros(2**20)  # 4 MiB
        scratch = torch.zeros(2**21)  # 8 MiB
        more = scratch * 2  # 8 MiB, together 16
        del scratch, more
        late = torch.zeros(2**21)
        return {"out": returned, "view": returned[5:], "sum": late.sum() + before.sum()}

    run()
    peak = memory.measure(run, CPU)
    assert 16 * 2**20 <= peak.extra < 16.1 * 2**20
    assert 4 * 2**20 <= peak.returned < 4.1 * 2**20
    event = {"name": "[memory]", "args": {"Device Type": 0, "Ev Idx": 1, "Addr": 5, "Bytes": -100}}
    assert memory.peak_of_events([event], {}) == 0  # freeing what was there before is no gain


def test_resident_memory_sees_what_torch_does_not():
    def run():
        hidden = bytearray(64 * 2**20)
        hidden[:: 2**12] = b"x" * (len(hidden) // 2**12)
        return {"out": torch.zeros(1)}

    run()
    peak = memory.measure(run, CPU)
    if peak.resident is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert peak.extra < 2**20 and peak.resident >= 60 * 2**20


def test_the_compiler_and_custom_operators_are_counted_too():
    """An operator of the project, called as a custom operator, allocates inside it."""
    weight, hidden = torch.randn(1000, 16), torch.randn(64, 16)
    inputs = (hidden, weight, torch.zeros(64, dtype=torch.int64))
    linear_logp = import_module("macpo.kernels").linear_logp
    linear_logp(*inputs)
    peak = memory.measure(lambda: {"out": linear_logp(*inputs)}, CPU)
    assert peak.extra >= 64 * 1000 * 4  # the logits


def test_device_names():
    assert device.device_slug(CPU).startswith("cpu-") and device.device_slug(CPU).endswith(
        f"-{torch.get_num_threads()}-thread" + "s" * (torch.get_num_threads() > 1)
    )
    assert " " not in device.device_slug(CPU)


def test_text_like_logits_are_peaked_and_random_ones_are_not():
    """The text-like kind is used for filtering kernels: much of the probability mass has to sit in few tokens."""
    text = heads.describe(heads.head_inputs(256, 256, 8000, "text", torch.float32, CPU, 2))
    flat = heads.describe(heads.head_inputs(256, 256, 8000, "random", torch.float32, CPU, 2))
    assert 0.8 < text["mean_nll"] < 2.0 and 0.15 < text["rows_with_top_p_above_0.9"] < 0.45
    assert flat["mean_nll"] > 8 and flat["rows_with_top_p_above_0.9"] == 0
    with pytest.raises(ValueError, match="do not make"):
        heads.head_inputs(10, 8, 20, "text", torch.float32, CPU, 3)


def test_a_script_that_fails_or_hangs_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "PARTS", {"pair_loss": 1})
    monkeypatch.setattr(run_all.subprocess, "run", lambda *a, **k: run_all.subprocess.CompletedProcess(a, 3))
    assert run_all.run_scripts(10, []) == {"pair_loss": "exit status 3"}

    def hang(*arguments, timeout, **options):
        raise run_all.subprocess.TimeoutExpired("bench", timeout)

    monkeypatch.setattr(run_all.subprocess, "run", hang)
    problems = run_all.run_scripts(10, [])
    assert problems["pair_loss"].startswith("stopped after")
    assert "pair_loss: stopped after" in "\n".join(run_all.summary(tmp_path, problems))
