"""`macpo plan`: what a run will do, before any model is loaded. Every figure of tokens, disk, memory and time is an
estimate from the recipe, model shapes and a sample of the data; the stages themselves are exact."""

from __future__ import annotations

import os
import statistics
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from macpo.config import AgentSettings, Recipe
from macpo.datasets import load_preferences
from macpo.engine.compute import device_of, dtype_of, memory_budget
from macpo.engine.config import LoraSettings
from macpo.engine.errors import MacpoError
from macpo.engine.files import free_bytes
from macpo.engine.loading import local_folder, read_json_object
from macpo.engine.pretrain import llama_shape
from macpo.engine.stages import Stage
from macpo.iteration import build_plan
from macpo.steps import Plan

FLOP_PER_S = {"cpu": 4.0e10, "cuda": 3.0e14}
"""Assumed useful FLOP/s of one CPU thread, and of one H100-class GPU in bfloat16 at about 40% utilisation."""
BYTES_PER_S = {"cpu": 1.0e10, "cuda": 3.0e12}
"""Assumed memory bandwidth: decoding reads every weight once a step."""
CHARS_PER_TOKEN = 4.0
PRETRAIN_DOCUMENT_TOKENS = 42


@dataclass(frozen=True, slots=True)
class Shape:
    """What the estimates need to know of a base model."""

    name: str
    num_parameters: int
    bytes_loaded: int
    bytes_policy: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of an answer."""

    prompt: float
    answer: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """One stage's estimated cost; `load` says that a base model has to be loaded for it."""

    stage: str
    tokens: int
    disk_bytes: int
    seconds: float
    base: str
    load: bool
    resident_bytes: int


def shape_of(agent: AgentSettings, recipe: Recipe) -> Shape:
    """Parameters and bytes from the `init` block, or from the model folder's config on the meta device."""
    size = dtype_of(recipe.compute).itemsize
    if agent.init is not None:
        config = llama_shape(agent.init)
        name = f"init {agent.init.hidden_size}x{agent.init.num_layers}"
    else:
        from transformers import AutoConfig

        name = str(agent.model or agent.positive)
        folder = local_folder(name)
        read_json_object(folder / "config.json")
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    policy = num_parameters * size
    if isinstance(agent.tuning, LoraSettings):
        names = agent.tuning.target_modules
        linears = [
            module
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and ((names == "all-linear" and "lm_head" not in path) or path.rpartition(".")[2] in names)
        ]
        policy = 4 * agent.tuning.rank * sum(m.in_features + m.out_features for m in linears)
    return Shape(name, num_parameters, num_parameters * size, policy)


def sample_lengths(recipe: Recipe) -> Lengths:
    """Mean lengths from up to 200 rows of the data, at four characters a token."""
    limit = recipe.context_tokens - recipe.sampling.max_new_tokens
    if recipe.data.world is not None:
        return Lengths(min(18, limit), min(24, recipe.sampling.max_new_tokens))
    data = recipe.data
    assert data.path is not None
    pairs, _ = load_preferences(
        data.path, format=data.format, columns=data.columns, split=data.split, subset=data.subset, max_rows=200
    )
    prompt = statistics.fmean(sum(len(m["content"]) for m in p.prompt.messages) for p in pairs) / CHARS_PER_TOKEN
    answer = statistics.fmean(len(p.chosen) for p in pairs) / CHARS_PER_TOKEN
    return Lengths(min(prompt, limit), min(answer, recipe.sampling.max_new_tokens))


def estimate(recipe: Recipe, plan: Plan) -> list[Estimate]:
    """The stages in order with their estimated costs, and which base has to be loaded under the memory budget."""
    shapes = {agent.name: shape_of(agent, recipe) for agent in (*recipe.teachers, recipe.student)}
    lengths, device = sample_lengths(recipe), device_of(recipe.compute).type
    budget = memory_budget(recipe.compute)
    resident: OrderedDict[str, int] = OrderedDict()
    rows = []
    for stage in plan.graph.stages:
        agent = _agent(stage, shapes)
        tokens, flop, weight_reads, disk = _cost(stage, recipe, lengths, shapes)
        threads = recipe.compute.threads or os.cpu_count() or 1
        rate = FLOP_PER_S[device] * (threads if device == "cpu" else 1)
        seconds = flop / rate + weight_reads / BYTES_PER_S[device]
        load = False
        if agent is not None:
            shape = shapes[agent]
            load = shape.name not in resident
            resident[shape.name] = shape.bytes_loaded
            resident.move_to_end(shape.name)
            while sum(resident.values()) > budget and len(resident) > 1:
                resident.popitem(last=False)
        rows.append(
            Estimate(stage.name, round(tokens), round(disk), seconds, agent or "", load, sum(resident.values()))
        )
    return rows


def _agent(stage: Stage, shapes: Mapping[str, Shape]) -> str | None:
    name = stage.settings.get("agent", {}).get("name")
    return name if name in shapes else None


def _cost(
    stage: Stage, recipe: Recipe, lengths: Lengths, shapes: Mapping[str, Shape]
) -> tuple[float, float, float, float]:
    """(tokens, FLOP, bytes of weights read while decoding, bytes on disk) of one stage."""
    kind, s = stage.kind.rpartition(".")[2], stage.settings
    student, test, world = recipe.data.student_prompts, recipe.data.test_prompts, recipe.data.world
    teacher = recipe.data.teacher_prompts
    if world is not None:
        student, test, teacher = world.student_prompts, world.test_prompts, world.teacher_pairs
    p, r = lengths.prompt, lengths.answer
    row_bytes = CHARS_PER_TOKEN * (p + 2 * r) + 200
    name = _agent(stage, shapes)
    n = shapes[name].num_parameters if name else 0
    if kind in ("split_prompts", "human_answers"):
        return 0, 0, 0, row_bytes * (teacher * len(recipe.teachers) + student + test)
    if kind == "pretrain_base":
        init, owner = s["init"], next(a for a in shapes if stage.name.endswith(f"base-{a}"))
        documents = world.student_documents if world is not None else 2000
        tokens = (
            (init["pretrain"]["max_documents"] or documents) * PRETRAIN_DOCUMENT_TOKENS * init["pretrain"]["epochs"]
        )
        shape = shapes[owner]
        return tokens, 6 * shape.num_parameters * tokens, 0, 4 * shape.num_parameters
    backward = 4 if s.get("tuning", {}).get("type") == "lora" else 6  # a frozen base needs no weight gradients
    if kind == "imitate":
        rows = teacher if s["file"].startswith("teacher-") else student
        tokens = rows * (p + r) * s["optim"]["epochs"]
        return tokens, backward * n * tokens, 0, shapes[name].bytes_policy if name else 0
    if kind == "prefer":
        tokens = student * (p + 2 * r)
        return (
            tokens * (1 + s["optim"]["epochs"]),
            (2 + backward * s["optim"]["epochs"]) * n * tokens,
            0,
            (shapes[name].bytes_policy if name else 0),
        )
    if kind == "answer":
        steps = -(-student // recipe.compute.generation_batch) * recipe.sampling.max_new_tokens
        reads = steps * shapes[name].bytes_loaded if name else 0
        return student * (p + r), 2 * n * student * (p + r), reads, student * row_bytes
    if kind == "score_candidates":
        count = sum(alias.startswith("answers:") for alias in stage.inputs)
        tokens = student * (p + count * r)
        return tokens, 2 * n * tokens, 0, student * (CHARS_PER_TOKEN * r + 100) * count
    if kind in ("evaluate_policy", "judge_base"):
        tokens = test * (p + 2 * r)
        steps = -(-test // recipe.compute.generation_batch) * recipe.sampling.max_new_tokens
        if kind == "judge_base":
            return tokens, 2 * n * tokens, 0, 60 * test
        reads = steps * shapes[name].bytes_loaded if name else 0
        return tokens + test * (p + r), 2 * n * (tokens + test * (p + r)), reads, test * (row_bytes + 200)
    return 0, 0, 0, student * row_bytes


def show(recipe: Recipe) -> str:
    """The plan as text; raises ResourceError through the callers' checks when the disk cannot hold it."""
    plan = build_plan(recipe)
    rows = estimate(recipe, plan)
    lines = [f"{len(rows)} stages into {recipe.output} (tokens, disk, memory and time are estimates)", ""]
    lines.append(f"{'stage':44} {'tokens':>13} {'disk':>9} {'time':>9}  base model")
    for row in rows:
        base = f"{row.base}{' (load)' if row.load else ''}" if row.base else ""
        lines.append(
            f"{row.stage:44} {row.tokens:13,} {_size(row.disk_bytes):>9} {_time(row.seconds):>9}  {base}".rstrip()
        )
    disk, seconds = sum(r.disk_bytes for r in rows), sum(r.seconds for r in rows)
    loads, peak = sum(r.load for r in rows), max(r.resident_bytes for r in rows)
    free = free_bytes_of(recipe)
    lines += [
        "",
        f"disk: about {_size(disk)}" + (f" of {_size(free)} free" if free is not None else ""),
        f"memory: base models kept loaded up to {_size(memory_budget(recipe.compute))}; at most {_size(peak)} at once, "
        f"{loads} loads",
        f"time: about {_time(seconds)} in one process on {device_of(recipe.compute).type}"
        + (f", {recipe.compute.jobs} stages at once" if recipe.compute.jobs > 1 else ""),
    ]
    return "\n".join(lines)


def free_bytes_of(recipe: Recipe) -> int | None:
    return free_bytes(Path(recipe.output))


def disk_needed(recipe: Recipe, plan: Plan) -> int | None:
    """Estimated bytes of the run; None where the models' shapes cannot be read here."""
    try:
        return sum(row.disk_bytes for row in estimate(recipe, plan))
    except MacpoError:
        return None  # `run` will say what is wrong with the model or the data, with the stage's own message


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
