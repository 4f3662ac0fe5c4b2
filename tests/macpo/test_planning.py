"""`macpo plan`: estimates follow the recipe, and the memory budget decides how often bases are loaded."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from standalone_runs import recipe_of
from tiny import tiny
from transformers import LlamaConfig, PretrainedConfig

from macpo.arguments import parser
from macpo.cli import COMMANDS
from macpo.commands.demo import demo_recipe
from macpo.commands.planning import rehearsal
from macpo.commands.planning.estimates import Estimate, Hardware, disk_needed, estimate, hardware_of, size_of
from macpo.commands.planning.plan import show
from macpo.commands.planning.plan_model import tuning_of
from macpo.commands.planning.rehearsal import Pace
from macpo.commands.run import run
from macpo.config import Recipe
from macpo.engine.config import LoraSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.errors import ConfigError
from macpo.engine.hardware import GPUS
from macpo.engine.models.flops import ModelShape
from macpo.engine.planning.calibrate import Measured
from macpo.engine.planning.fitting import HOST_BYTES, Workload, options
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.shapes import config_of
from macpo.engine.planning.step_time import Machine
from macpo.method.costs import MethodStage, RunSize
from macpo.methods.registry import build_plan
from macpo.recipe_kinds import load, plan_of


def rows(recipe: Recipe) -> list[Estimate]:
    return estimate(recipe, build_plan(recipe))


def with_memory(recipe: Recipe, gigabytes: float) -> Recipe:
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"memory_gb": gigabytes})})


def test_every_stage_is_planned_in_order(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    assert [row.stage for row in rows(recipe)] == [stage.name for stage in build_plan(recipe).graph.stages]
    assert all(row.disk_bytes >= 0 and row.seconds >= 0 for row in rows(recipe))
    assert next(row for row in rows(recipe) if row.stage == "base-student").tokens > 0


def test_the_budget_decides_how_many_bases_stay_loaded(tmp_path: Path) -> None:
    """K + 1 bases fit, or only one at a time does."""
    recipe = tiny(tmp_path)
    names = [agent.name for agent in (*recipe.teachers, recipe.student)]
    shapes = size_of(recipe).shapes
    sizes = [shapes[name].bytes_loaded for name in names]
    roomy, tight = rows(with_memory(recipe, 1.0)), rows(with_memory(recipe, max(sizes) / 1e9))
    assert sum(row.load for row in roomy) == len(names) and roomy[-1].resident_bytes == sum(sizes)
    assert sum(row.load for row in tight) > 2 * len(names)
    assert max(row.resident_bytes for row in tight) <= max(sizes)
    assert f"{sum(row.load for row in tight)} loads" in show(with_memory(recipe, max(sizes) / 1e9))


def test_adapters_cost_less_disk_than_whole_models(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    full, lora = (size_of(recipe).shapes[agent.name] for agent in recipe.teachers)
    tokenizer = full.bytes_policy - 4 * full.num_parameters
    assert 0 < tokenizer < 100 * ModelShape.of(full.config).vocab
    assert lora.bytes_policy - tokenizer < lora.bytes_loaded / 4


@pytest.mark.parametrize("kind", ["macpo", "preference", "sft"])
def test_the_disk_that_a_run_needs_is_what_it_writes(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    run_dir = tiny_run if kind == "macpo" else run(recipe_of(kind, None, tmp_path / "run"))
    recipe, report = load(run_dir), run_dir / "report.html"  # which is written last, and not by a stage
    written = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file() and file != report)
    needed = disk_needed(recipe, plan_of(recipe))
    assert needed is not None and written / 1.25 < needed < written * 1.25


def test_more_iterations_cost_more(tmp_path: Path) -> None:
    short, long = (rows(tiny(tmp_path, iterations=t)) for t in (1, 3))
    assert sum(row.tokens for row in long) > sum(row.tokens for row in short)
    assert sum(row.disk_bytes for row in long) > sum(row.disk_bytes for row in short)


def test_training_stages_have_memory_step_time_and_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    found = estimate(recipe, build_plan(recipe), hardware_of(recipe))
    trained = [row for row in found if row.training is not None]
    trains = {"pretrain_base", "imitate", "prefer"}
    stages = build_plan(recipe).graph.stages
    wanted = [stage.name for stage in stages if stage.kind in trains]
    assert [row.stage for row in trained] == wanted and len(wanted) > 10
    for row in trained:
        assert row.training is not None and row.training.fits and row.training.time.total > 0
        assert row.seconds >= row.training.time.total / 2
    full = next(row for row in trained if row.stage == "base-student")
    assert full.training is not None
    assert full.training.checkpoint == 12 * size_of(recipe).shapes[recipe.student.name].num_parameters
    text = show(recipe, hardware_of(recipe))
    assert max(map(len, text.splitlines()[1:])) <= 100 and "ckpt" in text and "DOES NOT FIT" not in text
    assert text.endswith("on a CPU of ordinary speed (--calibrate measures this one)")
    most = max(row.training.memory.device + row.beside_bytes for row in trained if row.training is not None)
    assert f"peak: at most {most / 1e9:.1f} GB in training" in text or f"{most / 1e6:.1f} MB in training" in text
    small = Hardware(Machine.of_gpu(GPUS["H100"]), room=1e6)
    assert "DOES NOT FIT: " in show(recipe, small) and show(recipe, small).endswith(" on H100")


def test_a_cpu_has_to_hold_the_models_that_stay_loaded_beside_what_trains(tmp_path: Path) -> None:
    """On a GPU idle models are dropped where memory runs out; a CPU's process would be killed."""
    recipe = tiny(tmp_path)
    plan, here = build_plan(recipe), hardware_of(recipe)
    rows = [row for row in estimate(recipe, plan, here) if row.training is not None and row.beside_bytes]
    row = max(rows, key=lambda row: row.training.memory.device + row.beside_bytes)  # type: ignore[union-attr]
    assert row.training is not None and row.beside_bytes < row.resident_bytes and not row.why_not
    room = row.training.memory.device + row.beside_bytes / 2
    recipe = with_memory(recipe, 1.0)
    tight = {each.stage: each for each in estimate(recipe, build_plan(recipe), replace(here, room=room))}[row.stage]
    assert tight.training is not None and tight.training.fits
    assert "other models stay loaded; set compute.memory_gb to" in tight.why_not
    assert f"DOES NOT FIT: {tight.why_not}" in show(recipe, replace(here, room=room))
    memory = replace(tight.training.memory, on_gpu=True)
    assert not replace(tight, training=replace(tight.training, memory=memory, room=memory.device + 1)).why_not


def test_a_cpu_is_measured_with_the_recipes_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of each kind that trains, scoring and decoding by shape, each once; here all are said to be slow."""
    recipe, steps, shapes = tiny(tmp_path), Counter[str](), Counter[str]()

    def slow(config: PretrainedConfig, setup: Setup, machine: Machine, groups: list[PrefixGroup], **_: Any) -> Measured:
        lengths = len(groups), len(groups[0].prompt_ids)
        steps[f"{config.hidden_size} {setup.tuning.type} {lengths} {len(groups[0].responses)}"] += 1
        return Measured(3.0, 1.0)

    def slowly(config: PretrainedConfig, setup: Setup, run: RunSize) -> Pace:
        shapes[str(config.hidden_size)] += 1
        return Pace(token=0.01, decode_step=0.5)

    monkeypatch.setattr(rehearsal, "measure", slow)
    monkeypatch.setattr(rehearsal, "_pace", slowly)
    plan, run = build_plan(recipe), size_of(recipe)
    assumed = {row.stage: row for row in estimate(recipe, plan, hardware_of(recipe))}
    measured = {row.stage: row for row in estimate(recipe, plan, hardware_of(recipe, measure=True))}
    assert set(shapes.values()) == {1} and len(shapes) == 3 and set(steps.values()) == {1}
    assert {key.rpartition(" ")[2] for key in steps} == {"1", "2"}, "SFT has one response, preference training two"
    for stage in plan.graph.stages:
        work, row = stage.work, measured[stage.name]
        assert isinstance(work, MethodStage)
        if row.training is not None:
            wanted = 3 * assumed[stage.name].seconds
        elif work.loads(run) is not None:
            cost = work.cost(run)
            wanted = 0.01 * (cost.tokens - cost.decoded) + 0.5 * cost.decode_steps
        else:
            wanted = 0.0
        assert row.seconds == pytest.approx(wanted + rehearsal.STAGE_S), stage.name
    tight = replace(hardware_of(recipe, measure=True), room=1.0)  # no model fits: a small one stands for all
    steps.clear()
    monkeypatch.setattr(rehearsal, "calibrate", lambda setup, machine: machine.calibrated(5.0, 1.0))
    found = {row.stage: row for row in estimate(recipe, plan, tight)}
    assert not steps and found["base-student"].seconds == pytest.approx(5 * assumed["base-student"].seconds + 0.3)


def test_what_cannot_be_measured_is_predicted_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny(tmp_path)

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no such\nmodel")

    monkeypatch.setattr(rehearsal, "random_policy", fails)
    monkeypatch.setattr(rehearsal, "measure", fails)
    monkeypatch.setattr(rehearsal, "calibrate", lambda setup, machine: machine.calibrated(5.0, 1.0))
    assumed, found = (
        {row.stage: row.seconds for row in estimate(recipe, build_plan(recipe), hardware_of(recipe, measure=measured))}
        for measured in (False, True)
    )
    for stage in ("base-student", "iter1-student-train"):
        assert found[stage] == pytest.approx(5 * assumed[stage] + rehearsal.STAGE_S)
    assert found["iter1-student-answer"] == pytest.approx(assumed["iter1-student-answer"] + rehearsal.STAGE_S)
    assert "a step cannot be measured (no such model), so it is predicted" in caplog.text


def test_a_rehearsal_stays_within_the_models_positions() -> None:
    short, long = LlamaConfig(max_position_embeddings=96), LlamaConfig(max_position_embeddings=8192)
    assert rehearsal._lengths(long, 60, 36) == (60, 36)
    prompt, response = rehearsal._lengths(short, 60, 36)
    assert prompt > response and 4 / 3 * (prompt + response) <= 96


def test_what_is_measured_on_a_cpu_is_positive_and_beside_other_work(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, iterations=0)
    busy = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"jobs": 2})})
    rows = estimate(busy, build_plan(busy), hardware_of(busy, measure=True))
    assert all(row.seconds > rehearsal.STAGE_S for row in rows if row.base)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen-2.5-0.5b", 494_032_768),
        ("qwen-2.5-7b", 7_615_616_512),
        ("qwen-2.5-72b", 72_706_203_648),
        ("qwen-3-8b", 8_190_735_360),
    ],
)
def test_named_shapes_have_the_published_parameters(name: str, count: int) -> None:
    assert ModelShape.of(config_of(name)).num_parameters == count


def test_which_settings_fit_and_why_not() -> None:
    config, work = config_of("llama-3-8b"), Workload()
    lora, full = (options(config, GPUS["A100"], 1, tuning_of(name), work) for name in ("lora", "full"))
    assert lora[0].fits and not any(each.fits for each in full)
    assert all(each.why_not for each in full) and "64 GB of moments" in {each.why_not for each in full}
    fit = [each.fits for each in lora]
    assert fit == sorted(fit, reverse=True)
    times = [each.time.total for each in lora if each.fits]
    assert all(b > 0.97 * a for a, b in pairwise(times))
    assert {each.setup.tuning.quantization for each in lora if isinstance(each.setup.tuning, LoraSettings)} == {
        "none",
        "nf4",
    }
    sharded = options(config, GPUS["A100"], 8, tuning_of("full"), work)
    assert sharded[0].fits and sharded[0].setup.parallel.sharding == "shard"
    assert all(each.setup.parallel.sharding != "hybrid" for each in sharded)
    assert {each.setup.parallel.tensor for each in sharded} == {1, 2, 4, 8}


def test_host_memory_helps_where_nothing_else_does() -> None:
    """One long pair a rank: the inputs of 80 blocks are what is too large."""
    work = Workload(pairs=8, prompt=60_000, response=10_000, microbatch_tokens=80_000)
    found = options(config_of("llama-3-70b"), GPUS["H100"], 8, tuning_of("lora"), work)
    best = found[0]
    assert best.fits and best.setup.parallel.offload_activations and best.setup.parallel.checkpointing == "full"
    assert 50e9 < best.memory.host < HOST_BYTES
    assert not any(each.fits for each in found if not each.setup.parallel.offload_activations)


@pytest.mark.parametrize(
    "options_",
    [
        ["--model", "llama-3-8b", "--gpus", "16"],
        ["--model", "llama-3.2-1b", "--gpus", "1", "--tuning", "full"],
        ["--table", "--pairs", "8"],  # one pair a rank: few rows to run dry
    ],
)
def test_the_tables_fit_a_screen(options_: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parser().parse_args(["plan", *options_])
    COMMANDS[arguments.command](arguments)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    if "--table" in options_:
        rows = [line.split() for line in lines if " lora " in line or " full " in line]
        assert [(row[0], row[1], row[2]) for row in rows] == [
            (model, tuning, nodes) for model in ("llama-3-70b", "llama-3-8b") for tuning in ("lora", "full")
            for nodes in "128"
        ]  # fmt: skip
        assert all(float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("options_", "message"),
    [
        ([], "there is nothing to plan"),
        (["--table", "--gpus", "8"], "--table shows its own"),
        (["--model", "gpt-5"], "there is no shape"),
        (["--model", "llama-3-8b", "--gpu", "v100"], "there is no GPU"),
        (["--model", "llama-3-8b", "--gpus", "12"], "no whole number of nodes"),
        (["--model", "llama-3-8b", "--set", "a=1"], "for a recipe"),
        (["recipe.yaml", "--pairs", "4"], "--pairs does not go with a recipe"),
        pytest.param(
            ["--model", "llama-3-8b", "--calibrate"],
            "to measure a step on",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there may be an H100 here"),
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options_: list[str], message: str) -> None:
    arguments = parser().parse_args(["plan", *options_])
    with pytest.raises(ConfigError, match=message):
        COMMANDS[arguments.command](arguments)


def test_the_largest_base_model_is_begun_first() -> None:
    """Else it ends last, and other jobs wait for it."""
    urgency = plan_of(demo_recipe(())).graph.urgency()
    bases = sorted((name for name in urgency if name.startswith("base-")), key=lambda name: -urgency[name])
    assert bases[0] == "base-student" and urgency["base-student"] == max(urgency[n] for n in urgency if n != "data")
