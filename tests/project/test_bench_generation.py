"""The generation and scoring benchmarks at toy sizes; wrong responses do not count; request files are reproducible."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import bench_generation, bench_scoring
from bench.harness.measure import measure, table
from bench.harness.options import run_bench
from bench.inputs import requests
from bench.peers import decode_floor

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "peers"), [("generation", "batches of"), ("scoring", "padded")])
def test_small_run(name, peers, tmp_path, capsys):
    module = import_module(f"bench.bench_{name}")
    options = ["--shapes", "small", "--device", "cpu", "--repeats", "2", "--peers", peers, "--json-dir", str(tmp_path)]
    (case,) = json.loads(run_bench(name, module.specs, module.__doc__, options).read_text())["cases"]
    assert case["flop"] > 0 and case["ceiling"]
    ours, *others = case["results"]
    assert ours["peer"] == module.OURS and ours["times_ours"] == 1.0
    assert [r["peer"] for r in others if r["peer"].endswith(("of 4", "of 8"))] == [r["peer"] for r in others[:2]]
    for result in (ours, *others[:2]):
        assert result["status"] == "exact"
        useful = result["items_per_s"] * result["median_ms"] / 1e3
        assert useful == pytest.approx(case["shape"]["useful_tokens" if name == "generation" else "tokens"])
    assert f"{ours['items_per_s']:.0f} /s" in capsys.readouterr().out


def test_a_wrong_response_is_seen():
    """One token that is not greedy, and a response that is too short."""
    (_, shape, dtype), *_ = bench_generation.SHAPES["small"]
    model, asked = bench_generation.make_model(shape, dtype, CPU), requests.load(shape.requests, shape.vocab)
    outputs = dict(bench_generation.build_ours(model, asked)())
    assert bench_generation.greedy_gap(model, asked, dtype, outputs) == 0.0
    for wrong in ((outputs["3"] + 1) % shape.vocab, outputs["3"][:-1]):
        assert bench_generation.greedy_gap(model, asked, dtype, {**outputs, "3": wrong}) == float("inf")


def test_our_other_paths_are_peers_and_the_floor_is_below_all():
    """Also of a shape whose head is a matrix of its own; the floor's parts add up, and the table names everyone."""
    for tied in (True, False):
        (_, shape, dtype), *_ = bench_generation.SHAPES["small"]
        case = bench_generation.make_case("x", replace(shape, tied=tied), dtype, CPU)
        ours = [peer for peer in case.peers if peer.name.startswith(bench_generation.OURS)]
        assert [peer.name for peer in ours] == ["macpo Generator", "macpo Generator, pool"]
        case.peers, case.ceiling = ours, None
        results = measure(case, 2, 30.0)
        assert [result.status for result in results] == ["exact", "exact"]
        assert 0 < case.floor_ms < min(result.median_ms for result in results)
        *_, parts, shares = table(case, results)
        numbers = [float(part.split()[-1]) for part in (p.split(" at ")[0] for p in parts.strip(" []").split(","))]
        assert sum(numbers) == pytest.approx(case.floor_ms, rel=0.02)
        assert f"macpo Generator, pool {case.floor_ms / results[1].median_ms:.0%}" in shares


def test_the_floor_counts_what_a_step_reads(monkeypatch):
    """With rates of 1 byte and 1 product a second the floor is a sum that can be done by hand."""
    (_, shape, dtype), *_ = bench_generation.SHAPES["small"]
    model = bench_generation.make_model(shape, dtype, CPU)
    monkeypatch.setattr(decode_floor, "seconds_of", lambda run, device: 2.0**25)
    asked = [requests.GenerationRequest([5] * 4, 3), requests.GenerationRequest([5] * 6, 1)]
    floor = decode_floor.decode_floor(model, asked)
    assert floor.bytes_per_s == 1 and decode_floor.kv_bytes(model) == 2 * 2 * 2 * 8 * 4
    assert floor.keys_values_s == (5 + 6) * decode_floor.kv_bytes(model)  # two steps of the one long response
    assert floor.products_s == 2 * 2**25 and floor.prompts_s == 2**25


def test_the_floor_counts_steps_of_as_many_rows_as_fit():
    """Three responses over two rows: the longest first, the third when a row is free; one token takes no step."""
    asked = [requests.GenerationRequest([5] * prompt, n) for prompt, n in ((10, 2), (20, 4), (30, 3), (40, 1))]
    assert list(decode_floor.steps_of(asked, 2)) == [(2, 20 + 1 + 30 + 1), (2, 20 + 2 + 30 + 2), (2, 20 + 3 + 10 + 1)]
    assert [rows for rows, _ in decode_floor.steps_of(asked, 9)] == [3, 2, 1]


def test_continuous_batching_is_asked_for_the_same_lengths():
    """transformers' own engine answers the requests, and leaves the model's attention as it was."""
    (_, shape, dtype), *_ = bench_generation.SHAPES["small"]
    model, asked = bench_generation.make_model(shape, dtype, CPU), requests.load(shape.requests, shape.vocab)[:2]
    before = model.config._attn_implementation
    outputs = bench_generation.build_continuous(model, asked)()
    assert bench_generation.greedy_gap(model, asked, dtype, outputs) == 0.0
    assert model.config._attn_implementation == before


def test_a_pretrained_model_is_named_and_has_a_result_of_its_own(tmp_path, monkeypatch):
    """Engines that read its folder are peers, each with its status; the shapes' own result is left alone."""
    (_, shape, dtype), *_ = bench_generation.SHAPES["small"]
    folder = tmp_path / "mine"
    bench_generation.make_model(shape, dtype, CPU).save_pretrained(folder)
    monkeypatch.setattr(bench_generation, "REAL", (4, 6, 5))
    options = [
        "--model",
        str(folder),
        "--repeats",
        "2",
        "--peers",
        "batches of 8,CTranslate2",
        "--json-dir",
        str(tmp_path),
    ]
    path = run_bench("generation", bench_generation.specs, "", options, bench_generation.pretrained)
    assert path.name == "generation-mine-float32.json" and not (tmp_path / "generation.json").exists()
    (case,) = json.loads(path.read_text())["cases"]
    assert case["shape"] | {"model": "mine", "requests": 4, "useful_tokens": 20, "prompt_tokens": 24} == case["shape"]
    status = {result["peer"]: result["status"] for result in case["results"]}
    assert status[bench_generation.OURS] == status["generate, batches of 8"] == "exact"
    assert status["CTranslate2"] in ("exact", "absent")


def test_request_files_are_what_the_script_writes(tmp_path, monkeypatch):
    committed = {path.name: path.read_bytes() for path in requests.FOLDER.iterdir()}
    monkeypatch.setattr(requests, "FOLDER", tmp_path)
    requests.main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed
    for name, (count, longest_prompt, longest_response) in requests.SIZES.items():
        rows = requests.load(name, 100)
        assert len(rows) == count and all(0 < len(r.prompt_ids) <= longest_prompt for r in rows)
        assert all(0 < r.new_tokens <= longest_response and max(r.prompt_ids) < 100 for r in rows)


def test_candidates_have_the_lengths_of_the_file():
    groups = bench_scoring.make_groups(bench_scoring.SHAPES["small"][0][1])
    asked = requests.load("hh-like-8", 512)
    assert [len(g.responses) for g in groups] == [bench_scoring.CANDIDATES] * 8
    assert [len(g.responses[0]) for g in groups] == [r.new_tokens for r in asked]
