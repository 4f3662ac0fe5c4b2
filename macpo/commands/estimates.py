"""What a recipe's stages cost on some hardware, estimated before anything runs; the stages themselves are exact."""

from __future__ import annotations

import os
import statistics
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from macpo.commands.plan_model import gpu_of
from macpo.config import AgentSettings, Recipe
from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.models.compute import device_of, dtype_of, memory_budget
from macpo.engine.models.flops import ModelShape
from macpo.engine.models.from_scratch import llama_shape
from macpo.engine.planning.calibrate import calibrate, this_machine
from macpo.engine.planning.fitting import Option, option
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.shapes import config_of
from macpo.engine.planning.step_time import Machine
from macpo.method.costs import CHARS_PER_TOKEN, MethodStage, RunSize, Shape, TrainingCost
from macpo.method.data_sets import read_pairs, source_of
from macpo.method.run_plan import Plan

BYTES_PER_S = {"cpu": 1.0e10, "cuda": 3.0e12}
"""Assumed memory bandwidth: decoding reads every weight once a step."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a recipe is planned for: one rank's machine and memory, and how many ranks share each stage."""

    machine: Machine
    room: float
    ranks: int = 1


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
    """Memory, step time and checkpoint of a stage that trains."""


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


def size_of(recipe: Recipe) -> RunSize:
    """The sizes that the costs of the recipe's stages depend on.

    Raises:
        MacpoError: a model whose shape, or data whose rows, cannot be read here.
    """
    data, world = recipe.data, recipe.data.world
    teacher, student, test, documents = data.teacher_prompts, data.student_prompts, data.test_prompts, 2000
    if world is not None:
        teacher, student, test = world.teacher_pairs, world.student_prompts, world.test_prompts
        documents = world.student_documents
    prompt, response = _sample_lengths(recipe)
    return RunSize(
        teacher_prompts=teacher,
        student_prompts=student,
        test_prompts=test,
        num_teachers=len(recipe.teachers),
        documents=documents,
        prompt_tokens=prompt,
        response_tokens=response,
        max_new_tokens=recipe.sampling.max_new_tokens,
        generation_batch=recipe.compute.generation_batch,
        shapes={agent.name: shape_of(agent, recipe) for agent in recipe.agents if agent.has_weights},
    )


def _sample_lengths(recipe: Recipe) -> tuple[float, float]:
    """Mean tokens of a prompt and a response in up to 200 rows of the data, at four characters a token."""
    limit = recipe.context_tokens - recipe.sampling.max_new_tokens
    if recipe.data.world is not None:
        return min(18, limit), min(24, recipe.sampling.max_new_tokens)
    pairs, _ = read_pairs(recipe.data, source_of(recipe.data, max_rows=200))
    prompt = statistics.fmean(sum(len(m["content"]) for m in p.prompt.messages) for p in pairs) / CHARS_PER_TOKEN
    response = statistics.fmean(len(p.chosen) for p in pairs) / CHARS_PER_TOKEN
    return min(prompt, limit), min(response, recipe.sampling.max_new_tokens)


def estimate(recipe: Recipe, plan: Plan, hardware: Hardware | None = None) -> list[Estimate]:
    """The stages in order with their estimated costs, and which base has to be loaded under the memory budget.

    Args:
        hardware: that stages are planned for; None is this machine, without memory and step time of the training.

    Raises:
        ConfigError: settings that a stage's model cannot be trained with.
    """
    machine = (hardware or hardware_of(recipe)).machine
    run, device = size_of(recipe), device_of(recipe.compute).type
    budget = memory_budget(recipe.compute)
    resident: OrderedDict[str, int] = OrderedDict()
    rows = []
    for name, work in _works(plan):
        cost, agent, training = work.cost(run), work.loads(run), None
        seconds = machine.scale * machine.product(cost.flop, dtype_of(recipe.compute))
        seconds += cost.weight_bytes / BYTES_PER_S[device]
        if hardware is not None and (learning := work.training(run)) is not None:
            training = _step(learning, recipe, hardware)
            seconds = learning.tokens / learning.step.tokens * training.time.total
        load = False
        if agent is not None:
            shape = run.shapes[agent]
            load = shape.name not in resident
            resident[shape.name] = shape.bytes_loaded
            resident.move_to_end(shape.name)
            while sum(resident.values()) > budget and len(resident) > 1:
                resident.popitem(last=False)
        disk, held = round(work.disk_bytes(run)), sum(resident.values())
        rows.append(Estimate(name, round(cost.tokens), disk, seconds, agent or "", load, held, training))
    return rows


def disk_needed(recipe: Recipe, plan: Plan) -> int | None:
    """Estimated bytes of the run; None where the models' shapes or the data cannot be read here."""
    try:
        run = size_of(recipe)
    except MacpoError:
        return None  # `run` will say what is wrong with the model or the data, with the stage's own message
    return sum(round(work.disk_bytes(run)) for _, work in _works(plan))


def _works(plan: Plan) -> Iterator[tuple[str, MethodStage]]:
    for stage in plan.graph.stages:
        assert isinstance(stage.work, MethodStage)
        yield stage.name, stage.work


def _step(learning: TrainingCost, recipe: Recipe, hardware: Hardware) -> Option:
    """Memory and time of one training step."""
    on_cpu = hardware.machine.waits
    dtype = dtype_of(recipe.compute) if on_cpu else torch.bfloat16
    setup = Setup(learning.tuning, recipe.compute.parallel, dtype, "cpu" if on_cpu else "cuda", hardware.ranks)
    return option(learning.config, setup, hardware.machine, hardware.room, learning.step)
