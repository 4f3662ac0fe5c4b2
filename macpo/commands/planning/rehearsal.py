"""How fast this CPU does a recipe's own work, measured with models of the same shapes and random weights.

Small models are bound by the calls of operators, large ones by their products, and both by what runs beside them: a
step of training, scoring and decoding are measured for each shape while as many processes compute as the recipe has
jobs. What cannot be measured so is predicted from a step of a small model.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from macpo.engine.config import FullSettings, microbatch_tokens
from macpo.engine.errors import is_failure, one_line
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.flops import ModelShape
from macpo.engine.planning.calibrate import calibrate, measure, pairs, random_policy
from macpo.engine.planning.fitting import Workload
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.step_time import Machine, step_time
from macpo.engine.processes import die_with
from macpo.engine.scoring import score
from macpo.method.costs import Cost, RunSize, Shape, TrainingCost

log = logging.getLogger(__name__)
T = TypeVar("T")
STAGE_S = 0.3
"""Of a stage beside its model's work: its files, their hashes, and the way between processes."""
_STEP_S = 1.0
"""Predicted seconds of the longest measured step; larger ones are measured with fewer rows."""
_SMALL = 5e7
"""Parameters up to which a model's decoding is measured for 16 steps, else for 4."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured seconds of inference with one model."""

    token: float
    """Of a token that goes through the model with many others."""
    decode_step: float
    """Of one step of decoding, a token for every response of a batch."""

    def seconds(self, cost: Cost) -> float:
        return self.token * (cost.tokens - cost.decoded) + self.decode_step * cost.decode_steps


@dataclass
class Rehearsal:
    """Measures what is asked for, each shape once. `room`: bytes that a model may take."""

    machine: Machine
    dtype: torch.dtype
    room: float
    _machines: dict[str, Machine] = field(default_factory=dict)
    _paces: dict[str, Pace | None] = field(default_factory=dict)

    def machine_of(self, learning: TrainingCost) -> Machine:
        """The machine on which a step like the stage's is predicted as long as it takes."""
        key = f"{learning.tuning!r} {learning.step!r} {learning.config.to_json_string()}"
        if key not in self._machines:
            needed = 4 * 4 * ModelShape.of(learning.config).num_parameters  # weights, gradients, two moments
            setup = Setup(learning.tuning, dtype=self.dtype, device="cpu")
            found = None
            if needed <= self.room:
                found = _tried(lambda: _rehearsed(learning.config, setup, self.machine, learning.step), "a step")
            self._machines[key] = found or self.generic
        return self._machines[key]

    def pace_of(self, shape: Shape, run: RunSize) -> Pace | None:
        """Seconds of scoring and decoding; None where they cannot be measured."""
        if shape.name not in self._paces:
            setup, found = Setup(FullSettings(), dtype=self.dtype, device="cpu"), None
            if shape.bytes_loaded <= self.room:
                found = _tried(lambda: _pace(shape.config, setup, run), "inference")
            self._paces[shape.name] = found
        return self._paces[shape.name]

    @cached_property
    def generic(self) -> Machine:
        """The machine by a step of a small model."""
        return calibrate(Setup(FullSettings(), dtype=self.dtype, device="cpu"), self.machine)


def _tried(measured: Callable[[], T], what: str) -> T | None:
    """The result; None where a model of that shape cannot be made or run here, as some of others' code cannot."""
    try:
        return measured()
    except BaseException as error:
        if not is_failure(error):
            raise
        log.warning("note: %s cannot be measured (%s), so it is predicted", what, one_line(error))
        return None


def _lengths(config: PretrainedConfig, prompt: float, response: float) -> tuple[int, int]:
    """Mean tokens of a prompt and a response whose longest pair has room in the model's positions."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    share = min(1.0, 0.75 * (most - 2) / (prompt + response))
    return max(1, int(prompt * share)), max(1, int(response * share))


def _rehearsed(config: PretrainedConfig, setup: Setup, machine: Machine, step: Workload) -> Machine:
    predicted = step_time(config, setup, machine, step.rows(1, setup.device)).total
    count = max(1, min(step.pairs, int(step.pairs * _STEP_S / predicted)))
    prompt, response = _lengths(config, step.prompt, step.response)
    groups = pairs(count, prompt, response, config.get_text_config().vocab_size, responses=step.responses)
    found = measure(
        config,
        setup,
        machine,
        groups,
        max_tokens=microbatch_tokens(step.microbatch_tokens, setup.device),
        repeats=5 if count > 1 else 2,
    )
    return machine.calibrated(found.seconds, found.predicted)


def _pace(config: PretrainedConfig, setup: Setup, run: RunSize) -> Pace:
    policy = random_policy(config, setup)
    prompt, response = _lengths(config, run.prompt_tokens, run.response_tokens)
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    count = max(2, min(256, int(_STEP_S * 3e10 / (2 * num_parameters * (prompt + response)))))
    groups = pairs(count, prompt, response, config.get_text_config().vocab_size)
    tokens = sum(len(group.prompt_ids) + sum(map(len, group.responses)) for group in groups)
    token = min(_seconds(lambda: score(policy, groups)) for _ in range(2)) / tokens
    batch = min(run.generation_batch, max(run.student_prompts, run.test_prompts))
    generator = Generator(policy.base, max_batch=batch)
    prompts = [[3 + number % 5, *groups[0].prompt_ids[:7]] for number in range(batch)]

    def decode(steps: int) -> float:
        params = SamplingParams(max_new_tokens=steps, ignore_eos=True)
        return min(_seconds(lambda: generator.generate(prompts, params)) for _ in range(2))

    steps, few = 16 if num_parameters <= _SMALL else 4, decode(1)
    return Pace(token, max(0.0, decode(1 + steps) - few) / steps)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextlib.contextmanager
def company(processes: int) -> Iterator[None]:
    """So many processes compute beside this one, as the stages do that run at once."""
    context = multiprocessing.get_context("spawn")
    ready = [context.Event() for _ in range(processes)]
    started = [context.Process(target=_compute, args=(os.getpid(), each), daemon=True) for each in ready]
    try:
        for process in started:
            process.start()
        for each in ready:
            each.wait(60.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def _compute(parent: int, ready: multiprocessing.synchronize.Event) -> None:
    die_with(parent)
    torch.set_num_threads(1)
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(512, 256)
    while True:
        for _ in range(20):
            torch.relu(x @ weight).square().mean().backward()
        weight.grad = None
        ready.set()
