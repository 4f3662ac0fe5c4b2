"""`macpo plan`: what a run will do, before any model is loaded. Every figure of tokens, disk, memory and time is an
estimate from the recipe, model shapes and a sample of the data; the stages themselves are exact."""

from __future__ import annotations

import os
import statistics
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from macpo.commands.plan_model import gpu_of
from macpo.config import AgentSettings, Recipe
from macpo.data.preferences import load_preferences
from macpo.data.rows import Source
from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.models.compute import device_of, dtype_of, memory_budget
from macpo.engine.models.flops import ModelShape
from macpo.engine.models.from_scratch import llama_shape
from macpo.engine.planning.calibrate import calibrate, this_machine
from macpo.engine.planning.fitting import Option, Workload, option
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.shapes import config_of
from macpo.engine.planning.step_time import Machine
from macpo.engine.run.stages import Stage
from macpo.method.reference import TUNING
from macpo.method.run_plan import Plan

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
    config: PretrainedConfig


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a recipe is planned for: one rank's machine and memory, and how many ranks share each stage."""

    machine: Machine
    room: float
    ranks: int = 1


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
    training: Option | None = None
    """Of a stage that trains: memory, step time and checkpoint."""


def hardware_of(recipe: Recipe, gpu: str | None = None, gpus: int | None = None, measure: bool = False) -> Hardware:
    """The GPUs that are named, or this machine; with `measure` scaled by one step on it.

    Raises:
        ConfigError: an unknown GPU, or one to be measured that is not here.
    """
    compute, ranks = recipe.compute, gpus or 1
    device = device_of(compute).type
    if gpu is not None:
        if measure:
            raise ConfigError("--calibrate measures this machine", "leave out --gpu or --calibrate")
        planned = gpu_of(gpu)
        return Hardware(Machine.of_gpu(planned), float(planned.memory_bytes), ranks)
    threads = compute.threads or torch.get_num_threads()
    if device == "cuda":
        room = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / compute.jobs
    machine = this_machine(device, threads)
    if measure:
        torch.set_num_threads(threads)
        setup = Setup(FullSettings(), dtype=dtype_of(compute), device="cuda" if device == "cuda" else "cpu")
        machine = calibrate(setup, machine)
    return Hardware(machine, room, ranks)


def shape_of(agent: AgentSettings, recipe: Recipe) -> Shape:
    """Parameters and bytes from the `init` block, or from the model folder's config."""
    size = dtype_of(recipe.compute).itemsize
    if agent.init is not None:
        config: PretrainedConfig = llama_shape(agent.init)
        name = f"init {agent.init.hidden_size}x{agent.init.num_layers}"
    else:
        name = str(agent.model or agent.positive)
        config = config_of(name)
    shape = ModelShape.of(config)
    policy = shape.num_parameters * 4
    if isinstance(agent.tuning, LoraSettings):
        policy = 4 * shape.adapter_parameters(agent.tuning.rank, agent.tuning.target_modules)
    return Shape(name, shape.num_parameters, shape.num_parameters * size, policy, config)


def sample_lengths(recipe: Recipe) -> Lengths:
    """Mean lengths from up to 200 rows of the data, at four characters a token."""
    limit = recipe.context_tokens - recipe.sampling.max_new_tokens
    if recipe.data.world is not None:
        return Lengths(min(18, limit), min(24, recipe.sampling.max_new_tokens))
    data = recipe.data
    assert data.path is not None
    source = Source(data.path, data.split, data.subset, data.columns, max_rows=200)
    pairs, _ = load_preferences(source, format=data.format)
    prompt = statistics.fmean(sum(len(m["content"]) for m in p.prompt.messages) for p in pairs) / CHARS_PER_TOKEN
    answer = statistics.fmean(len(p.chosen) for p in pairs) / CHARS_PER_TOKEN
    return Lengths(min(prompt, limit), min(answer, recipe.sampling.max_new_tokens))


def estimate(recipe: Recipe, plan: Plan, hardware: Hardware | None = None) -> list[Estimate]:
    """The stages in order with their estimated costs, and which base has to be loaded under the memory budget.

    Args:
        hardware: that stages are planned for; None is this machine, without memory and step time of the training.

    Raises:
        ConfigError: settings that a stage's model cannot be trained with.
    """
    machine = (hardware or hardware_of(recipe)).machine
    shapes = {agent.name: shape_of(agent, recipe) for agent in recipe.agents if agent.has_weights}
    lengths, device = sample_lengths(recipe), device_of(recipe.compute).type
    budget = memory_budget(recipe.compute)
    resident: OrderedDict[str, int] = OrderedDict()
    rows = []
    for stage in plan.graph.stages:
        agent = _agent(stage, shapes)
        tokens, flop, weight_reads, disk = _cost(stage, recipe, lengths, shapes)
        seconds = machine.scale * machine.product(flop, dtype_of(recipe.compute)) + weight_reads / BYTES_PER_S[device]
        training = None
        if hardware is not None and (work := _workload(stage, lengths, shapes)) is not None:
            training = _training(stage, recipe, shapes[work[0]], work[1], hardware)
            passes = tokens
            if stage.kind == "prefer":  # one pass more, of the reference, a forward alone
                epochs = stage.settings["optim"]["epochs"]
                passes = tokens * (epochs + 1 / 3) / (1 + epochs)
            seconds = passes / work[1].tokens * training.time.total
        load = False
        if agent is not None:
            shape = shapes[agent]
            load = shape.name not in resident
            resident[shape.name] = shape.bytes_loaded
            resident.move_to_end(shape.name)
            while sum(resident.values()) > budget and len(resident) > 1:
                resident.popitem(last=False)
        rows.append(
            Estimate(
                stage.name, round(tokens), round(disk), seconds, agent or "", load, sum(resident.values()), training
            )
        )
    return rows


def _agent(stage: Stage, shapes: Mapping[str, Shape]) -> str | None:
    name = stage.settings.get("agent", {}).get("name")
    served = "served" in stage.settings and stage.kind == "answer"  # the work is the server's
    return name if name in shapes and not served else None


def _workload(stage: Stage, lengths: Lengths, shapes: Mapping[str, Shape]) -> tuple[str, Workload] | None:
    """Who learns in a stage that trains, and what one of its steps holds."""
    kind, s = stage.kind, stage.settings
    if kind == "pretrain_base":
        optim = s["init"]["pretrain"]
        work = Workload(optim["batch"], 1, PRETRAIN_DOCUMENT_TOKENS - 1, optim["microbatch_tokens"], answers=1)
        return next(name for name in shapes if stage.name.endswith(f"base-{name}")), work
    if kind not in ("imitate", "prefer"):
        return None
    prompt, answer = max(1, round(lengths.prompt)), max(1, round(lengths.answer))
    limit, answers = s["optim"]["microbatch_tokens"], 2 if kind == "prefer" else 1
    return s["agent"]["name"], Workload(s["optim"]["batch"], prompt, answer, limit, answers)


def _training(stage: Stage, recipe: Recipe, shape: Shape, work: Workload, hardware: Hardware) -> Option:
    """Memory and step time of a stage that trains."""
    on_cpu = hardware.machine.waits
    tuning = TUNING.validate_python(stage.settings.get("tuning", {"type": "full"}))
    dtype = dtype_of(recipe.compute) if on_cpu else torch.bfloat16
    setup = Setup(tuning, recipe.compute.parallel, dtype, "cpu" if on_cpu else "cuda", hardware.ranks)
    return option(shape.config, setup, hardware.machine, hardware.room, work)


def _cost(
    stage: Stage, recipe: Recipe, lengths: Lengths, shapes: Mapping[str, Shape]
) -> tuple[float, float, float, float]:
    """(tokens, FLOP, bytes of weights read while decoding, bytes on disk) of one stage."""
    kind, s = stage.kind, stage.settings
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
        reads = steps * shapes[name].bytes_loaded if name and "served" not in s else 0
        answering = 0 if "served" in s else 2 * n * test * (p + r)
        return tokens + test * (p + r), 2 * n * tokens + answering, reads, test * (row_bytes + 200)
    return 0, 0, 0, student * row_bytes


def disk_needed(recipe: Recipe, plan: Plan) -> int | None:
    """Estimated bytes of the run; None where the models' shapes cannot be read here."""
    try:
        return sum(row.disk_bytes for row in estimate(recipe, plan))
    except MacpoError:
        return None  # `run` will say what is wrong with the model or the data, with the stage's own message
