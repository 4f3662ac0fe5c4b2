"""What a recipe's stages cost on some hardware, estimated before anything runs; the stages themselves are exact."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from macpo.agent_settings import AgentSettings
from macpo.commands.planning.plan_model import gpu_of
from macpo.commands.planning.rehearsal import STAGE_S, Rehearsal, company
from macpo.config import Recipe
from macpo.demo_world.build import vocabulary
from macpo.engine.config import ComputeSettings, FullSettings, LoraSettings
from macpo.engine.data.records import Example, Pair
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.hardware import host_memory
from macpo.engine.models.compute import RESIDENT_SHARE, device_of, dtype_of, generation_batch
from macpo.engine.models.flops import ModelShape
from macpo.engine.planning.calibrate import calibrate, this_machine
from macpo.engine.planning.fitting import Option, option
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.shapes import config_of
from macpo.engine.planning.step_time import Machine
from macpo.engine.run.time_left import Planned
from macpo.method.costs import CHARS_PER_TOKEN, Cost, MethodStage, RunSize, Shape, TrainingCost, made_config
from macpo.method.data_sets import held_out_source, judged_rows, own_source, read_pairs, source_of
from macpo.method.identities import Identities
from macpo.method.run_plan import Plan
from macpo.method.scoring.planned import own_model
from macpo.recipe_kinds import AnyRecipe
from macpo.standalone.config import PolicyRecipe, Standalone
from macpo.standalone.records import Sets, sample_rows

STAGE_BYTES = 4000
"""Of a stage's manifest, timing and log."""
TOKEN_BYTES = 100
"""Of a token in tokenizer.json, where it cannot be looked at: 71 at SmolLM2, 127 at Gemma 3."""
MADE_TOKEN_BYTES = 25
"""The same for a tokenizer that the run makes."""
WORLD_TOKENS = (18.0, 24.0, 33.0)
"""Mean tokens of the demo world's prompts, responses and documents."""
BYTES_PER_S = {"cpu": 1.0e10, "cuda": 3.0e12}
"""Assumed memory bandwidth: decoding reads every weight once a step."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a recipe is planned for: one rank's machine and memory, and how many ranks share each stage."""

    machine: Machine
    room: float
    ranks: int = 1
    rehearsed: bool = False
    """Whether the recipe's own work is measured on this CPU."""

    @property
    def guessed(self) -> bool:
        """Whether its speed is that of CPUs in general; others are several times slower or faster."""
        return self.device == "cpu" and not self.rehearsed and self.machine.scale == 1.0

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.machine.waits else "cuda"

    def dtype(self, compute: ComputeSettings) -> torch.dtype:
        """The dtype of frozen weights and activations on this hardware."""
        auto = torch.float32 if self.device == "cpu" else torch.bfloat16
        return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[compute.dtype]

    def budget(self, compute: ComputeSettings) -> int:
        """Bytes that the base models loaded in one process may take."""
        return int(compute.memory_gb * 1e9 if compute.memory_gb is not None else RESIDENT_SHARE * self.room)


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
    """Base models that are kept loaded, the stage's own among them."""
    beside_bytes: int = 0
    """Those of them that the stage does not use."""
    training: Option | None = None
    """Memory, step time and checkpoint of a stage that trains."""

    @property
    def why_not(self) -> str:
        """Why the stage's training does not fit; empty where it does. A GPU's idle models are dropped where they are in
        the way; of a CPU's memory the system takes note too late."""
        if self.training is None:
            return ""
        if not self.training.fits:
            return self.training.why_not
        room, needed = self.training.room, self.training.memory.device
        if self.training.memory.on_gpu or needed + self.beside_bytes <= room:
            return ""
        most = max(0.0, room - needed + self.resident_bytes - self.beside_bytes) / 1e9
        return f"{self.beside_bytes / 1e9:.1f} GB of other models stay loaded; set compute.memory_gb to {most:.1f}"


def hardware_of(recipe: AnyRecipe, gpu: str | None = None, gpus: int | None = None, measure: bool = False) -> Hardware:
    """The GPUs that are named, or this machine; with `measure` a GPU is scaled by one step on it, and `estimate`
    measures on a CPU what the recipe's stages do.

    Raises:
        ConfigError: an unknown GPU, or one to be measured that is not here.
    """
    compute, ranks = recipe.compute, gpus or 1
    if gpu is not None:
        if measure:
            raise ConfigError("--calibrate measures this machine", "leave out --gpu or --calibrate")
        planned = gpu_of(gpu)
        return Hardware(Machine.of_gpu(planned), float(planned.memory_bytes), ranks)
    device = device_of(compute).type
    threads = compute.threads or torch.get_num_threads()
    on_gpu = device == "cuda"
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else host_memory() / compute.jobs
    machine = this_machine(device, threads)
    if measure and on_gpu:
        machine = calibrate(Setup(FullSettings(), dtype=dtype_of(compute), device="cuda"), machine)
    return Hardware(machine, float(room), ranks, rehearsed=measure and not on_gpu)


def shape_of(agent: AgentSettings, dtype: torch.dtype, words: int | None = None) -> Shape:
    """Parameters and bytes from the `init` block, or from the model folder's config.

    `dtype`: of loaded weights. `words`: different words of the data, where they are known.
    """
    if agent.init is not None:
        config: PretrainedConfig = made_config(agent.init, words)
        name = f"init {agent.init.hidden_size}x{agent.init.num_layers}"
    else:
        name = str(agent.model or agent.positive)
        config = config_of(name)
    try:
        shape = ModelShape.of(config)
    except (AttributeError, KeyError, TypeError) as error:  # a config without what every transformer has
        problem = f"the sizes of a {config.model_type} cannot be told ({error})"
        raise ConfigError(problem, "use a causal LM with attention in every layer", file=name) from error
    policy = shape.num_parameters * 4
    if isinstance(agent.tuning, LoraSettings):
        policy = 4 * shape.adapter_parameters(agent.tuning.rank, agent.tuning.target_modules)
    policy += _tokenizer_bytes(name, shape.vocab) if agent.init is None else MADE_TOKEN_BYTES * shape.vocab
    return Shape(name, shape.num_parameters, shape.num_parameters * dtype.itemsize, policy, config)


def _tokenizer_bytes(model: str, vocab: int) -> int:
    """What a policy's own copy of the tokenizer takes: a large vocabulary's is larger than an adapter."""
    file = Path(model).expanduser() / "tokenizer.json"
    return file.stat().st_size if file.is_file() else TOKEN_BYTES * vocab


def size_of(recipe: AnyRecipe, dtype: torch.dtype = torch.float32, sets: Sets | None = None) -> RunSize:
    """The sizes that the costs of the recipe's stages depend on.

    Args:
        dtype: of loaded weights.
        sets: the data of a standalone recipe; without it the number of rows is judged by the size of the files.

    Raises:
        MacpoError: a model whose shape, or data whose rows, cannot be read here.
    """
    words = len(vocabulary()) if recipe.data.world is not None else None
    shapes = {agent.name: shape_of(agent, dtype, words) for agent in recipe.agents if agent.has_weights}
    if not isinstance(recipe, Recipe):
        found = replace(_standalone_size(recipe, sets, shapes), words=words)
        sampling = recipe.sampling if isinstance(recipe, PolicyRecipe) else None
        batch = generation_batch(recipe.compute)
        return replace(found, max_new_tokens=sampling.max_new_tokens, generation_batch=batch) if sampling else found
    data, world = recipe.data, recipe.data.world
    teacher, student, documents = data.teacher_prompts, data.student_prompts, 2000
    test = Identities(must_exist=False).sized(data, read_pairs).test_prompts or data.most_test_prompts
    prompt, response = _sample_lengths(recipe)
    document = prompt + response
    if world is not None:
        teacher, student, test = world.teacher_pairs, world.student_prompts, world.test_prompts
        documents, document = world.student_documents, WORLD_TOKENS[2]
    scorers = filter(None, map(own_model, recipe.evaluation.scorers))
    shapes = {agent.name: shape_of(agent, dtype) for agent in scorers} | shapes
    return RunSize(
        teacher_prompts=teacher,
        student_prompts=student,
        test_prompts=test,
        reward_prompts=data.reward_prompts,
        dev_prompts=data.num_dev_prompts,
        own_prompts={each.name: _own_prompts(recipe, each) for each in recipe.teachers if each.data is not None},
        num_teachers=len(recipe.teachers),
        documents=documents,
        document_tokens=document,
        prompt_tokens=prompt,
        response_tokens=response,
        max_new_tokens=recipe.sampling.max_new_tokens,
        generation_batch=generation_batch(recipe.compute),
        shapes=shapes,
        words=words,
    )


def _own_prompts(recipe: Recipe, teacher: AgentSettings) -> int:
    """Rows of a teacher's own data, judged by the size of its files."""
    assert teacher.data is not None
    source = replace(own_source(recipe.data, teacher.data), max_rows=200)
    found = judged_rows(source, *read_pairs(recipe.data, source))
    return min(found, teacher.data_prompts or found)


def _standalone_size(recipe: Standalone, sets: Sets | None, shapes: dict[str, Shape]) -> RunSize:
    data, world = recipe.data, recipe.data.world
    prompt, response, document = WORLD_TOKENS
    train, test = data.train_prompts or 0, data.test_prompts or data.most_test_prompts
    rows: Sequence[Pair | Example] = ()
    if sets is not None:
        rows, train, test = [*sets.train[:200], *sets.test[:200]], len(sets.train), len(sets.test)
    elif world is not None:
        train, test = world.student_prompts, world.test_prompts
    else:
        rows, found = sample_rows(data, 200)
        test = data.test_size(found, apart=held_out_source(data) is not None)
        train = data.train_prompts or max(1, found - test)
    if rows:
        responses = [[row.response] if isinstance(row, Example) else [row.chosen, row.rejected] for row in rows]
        prompt = statistics.fmean(sum(len(m["content"]) for m in row.prompt.messages) for row in rows) / CHARS_PER_TOKEN
        response = statistics.fmean(len(text) for texts in responses for text in texts) / CHARS_PER_TOKEN
    prompt = min(prompt, recipe.max_prompt_tokens)
    return RunSize(
        teacher_prompts=0,
        student_prompts=train,
        test_prompts=test,
        num_teachers=0,
        documents=world.student_documents if world is not None else len(sets.documents) if sets is not None else 0,
        document_tokens=document if world is not None else prompt + response,
        prompt_tokens=prompt,
        response_tokens=min(response, recipe.context_tokens - prompt),
        max_new_tokens=0,
        generation_batch=1,
        shapes=shapes,
    )


def _sample_lengths(recipe: Recipe) -> tuple[float, float]:
    """Mean tokens of a prompt and a response in up to 200 rows of the data, at four characters a token."""
    limit = recipe.context_tokens - recipe.sampling.max_new_tokens
    if recipe.data.world is not None:
        return min(WORLD_TOKENS[0], limit), min(WORLD_TOKENS[1], recipe.sampling.max_new_tokens)
    pairs, _ = read_pairs(recipe.data, source_of(recipe.data, max_rows=200))
    prompt = statistics.fmean(sum(len(m["content"]) for m in p.prompt.messages) for p in pairs) / CHARS_PER_TOKEN
    response = statistics.fmean(len(p.chosen) for p in pairs) / CHARS_PER_TOKEN
    return min(prompt, limit), min(response, recipe.sampling.max_new_tokens)


def estimate(
    recipe: AnyRecipe, plan: Plan, hardware: Hardware | None = None, sets: Sets | None = None
) -> list[Estimate]:
    """The stages in order with their estimated costs, and which base has to be loaded under the memory budget.

    Args:
        hardware: that stages are planned for; None is this machine, without memory and step time of the training.
        sets: the data of a standalone recipe.

    Raises:
        ConfigError: settings that a stage's model cannot be trained with.
    """
    here = hardware or hardware_of(recipe)
    dtype, budget = here.dtype(recipe.compute), here.budget(recipe.compute)
    run = size_of(recipe, dtype, sets)
    rehearsal = Rehearsal(here.machine, dtype, here.room) if here.rehearsed else None
    resident: OrderedDict[str, int] = OrderedDict()
    rows = []
    with _rehearsing(recipe, rehearsal):
        for name, work in works(plan):
            cost, agent, learning = work.cost(run), work.loads(run), None
            shape = run.shapes[agent] if agent is not None else None
            if hardware is not None:
                learning = work.training(run)
            training = None if learning is None else _step(learning, recipe, here, rehearsal)
            if learning is not None and training is not None:
                seconds = learning.tokens / learning.step.tokens * training.time.total
            else:
                seconds = _inference(cost, here, dtype, shape, rehearsal, run)
            seconds += STAGE_S if rehearsal is not None else 0.0
            load, own = False, 0
            if shape is not None:
                own = shape.bytes_loaded
                load = shape.name not in resident
                resident[shape.name] = shape.bytes_loaded
                resident.move_to_end(shape.name)
                while sum(resident.values()) > budget and len(resident) > 1:
                    resident.popitem(last=False)
            disk, held = round(work.disk_bytes(run)), sum(resident.values())
            rows.append(
                Estimate(name, round(cost.tokens), disk, seconds, agent or "", load, held, held - own, training)
            )
    return rows


def _inference(
    cost: Cost, here: Hardware, dtype: torch.dtype, shape: Shape | None, rehearsal: Rehearsal | None, run: RunSize
) -> float:
    """Seconds of a stage that does not train."""
    pace = rehearsal.pace_of(shape, run) if rehearsal is not None and shape is not None else None
    if pace is not None:
        return pace.seconds(cost)
    read = cost.decode_steps * (shape.bytes_loaded if shape is not None else 0)
    return here.machine.scale * here.machine.product(cost.flop, dtype) + read / BYTES_PER_S[here.device]


@contextmanager
def _rehearsing(recipe: AnyRecipe, rehearsal: Rehearsal | None) -> Iterator[None]:
    """Context in which a rehearsal measures with the recipe's threads, beside as many processes as it has jobs."""
    if rehearsal is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.compute.threads or threads)
    try:
        with company(recipe.compute.jobs - 1):
            yield
    finally:
        torch.set_num_threads(threads)


def durations(recipe: AnyRecipe, plan: Plan) -> dict[str, Planned]:
    """What each stage is planned to take on this machine, for the time left, at once and without memory of the
    training; empty where the models' shapes or the data cannot be read here."""
    try:
        rows = estimate(recipe, plan)
    except MacpoError:
        return {}
    kinds = {stage.name: stage.kind for stage in plan.graph.stages}
    return {
        row.stage: Planned(row.seconds, (kinds[row.stage], *([f"{kinds[row.stage]} {row.base}"] if row.base else ())))
        for row in rows
    }


def disk_needed(recipe: AnyRecipe, plan: Plan) -> int | None:
    """Estimated bytes of the run; None where the models' shapes or the data cannot be read here."""
    try:
        run = size_of(recipe)
    except MacpoError:
        return None  # `run` will say what is wrong with the model or the data, with the stage's own message
    return sum(round(work.disk_bytes(run)) + STAGE_BYTES for _, work in works(plan))


def works(plan: Plan) -> Iterator[tuple[str, MethodStage]]:
    """The stages of a plan, each with its work."""
    for stage in plan.graph.stages:
        assert isinstance(stage.work, MethodStage)
        yield stage.name, stage.work


def _step(learning: TrainingCost, recipe: AnyRecipe, hardware: Hardware, rehearsal: Rehearsal | None) -> Option:
    """Memory and time of one training step."""
    dtype = hardware.dtype(recipe.compute) if hardware.device == "cpu" else torch.bfloat16
    setup = Setup(learning.tuning, recipe.compute.parallel, dtype, hardware.device, hardware.ranks)
    machine = hardware.machine if rehearsal is None else rehearsal.machine_of(learning)
    return option(learning.config, setup, machine, hardware.room, learning.step)
