"""Measures one training step of a small model on this machine and compares it with the prediction of `step_time`.

The model is random and the pairs are random tokens of ordinary lengths; a step is the trainer's: forward, loss,
backward, norm, AdamW.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from macpo.engine import hardware
from macpo.engine.config import FullSettings, LoraSettings, PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.liger import use_liger
from macpo.engine.models.loading import quiet_transformers
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.planning.memory import Row, Setup
from macpo.engine.planning.step_time import Machine, step_time
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.optim import Optimizer

MODELS: dict[str, dict[str, Any]] = {
    "cpu": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 768},
    "cuda": {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32, "intermediate_size": 8192},
}
"""Models of the calibration step: large enough not to measure Python, small enough to take a few seconds."""


def calibration_config(device: str, vocab: int = 8192) -> LlamaConfig:
    """The shape of the calibration step for `cpu` or `cuda`."""
    sizes = MODELS[device]
    heads = sizes["num_attention_heads"] // 4
    return LlamaConfig(vocab_size=vocab, num_key_value_heads=heads, max_position_embeddings=4096, **sizes)


def pairs(
    count: int, prompt: int, response: int, vocab: int, *, responses: int = 2, seed: int = 0
) -> list[PrefixGroup]:
    """Random prompts with so many responses each, whose lengths vary by a third around the means."""
    draw = random.Random(seed)

    def ids(mean: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(draw.randint(max(1, mean * 2 // 3), mean * 4 // 3))]

    return [PrefixGroup(ids(prompt), [ids(response) for _ in range(responses)]) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured and predicted seconds of one step."""

    seconds: float
    predicted: float


def calibrate(
    setup: Setup, machine: Machine, *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> Machine:
    """Scale `machine` by a calibration step with `setup`'s device, dtype and tuning, on one rank of this machine."""
    config = calibration_config(setup.device)
    groups = pairs(16, 120, 50, config.vocab_size)
    measured = measure(config, setup, machine, groups, repeats=repeats, clock=clock)
    return machine.calibrated(measured.seconds, measured.predicted)


def measure(
    config: PretrainedConfig,
    setup: Setup,
    machine: Machine,
    groups: list[PrefixGroup],
    *,
    max_tokens: int = 8192,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Measure the median seconds of whole steps over `groups`, after two warm-up steps: SFT of one response, DPO of 2.

    Args:
        setup: a setup of one rank on this machine.
        clock: returns seconds; `time.process_time` with one thread ignores the machine's other load.
    """
    policy = random_policy(config, setup)
    batches = pack(groups, max_tokens=max_tokens)
    paired = len(groups[0].responses) == 2
    objective = preference(PreferenceSettings(), torch.zeros(len(groups), 2)) if paired else sft()
    optimizer = Optimizer(policy.trainable_parameters(), PreferenceSettings())
    cuda = setup.device == "cuda"
    seconds = []
    with attention_hook(policy.base):
        for _ in range(repeats + 2):
            start = clock()
            stats = torch.zeros(1, device=policy.device)
            for batch in batches:
                loss, _ = objective(policy, batch, len(groups))
                loss.backward()
                stats[0] += loss.detach()
            norm = float(optimizer.reduce(World(), stats))
            optimizer.update(1e-6, norm)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    predicted = step_time(config, setup, machine, [row_of(groups, batch.groups) for batch in batches]).total
    return Measured(statistics.median(seconds[2:]), predicted)


def this_machine(device: str, threads: int | None = None) -> Machine:
    """The machine of this process; a GPU that is not in `hardware.GPUS` starts as an H100, to be calibrated."""
    if device == "cpu":
        return Machine.of_cpu(threads or torch.get_num_threads())
    return Machine.of_gpu(hardware.of_device("cuda") or hardware.GPUS["H100"])


def row_of(groups: list[PrefixGroup], indices: tuple[int, ...]) -> Row:
    """The lengths of packed groups."""
    return [(len(groups[i].prompt_ids), [len(response) for response in groups[i].responses]) for i in indices]


def random_policy(config: PretrainedConfig, setup: Setup) -> PolicyModule:
    """A policy of that shape with random weights."""
    with torch.device(setup.device), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    full = isinstance(setup.tuning, FullSettings)
    model = model.to(torch.float32 if full else setup.dtype).eval().requires_grad_(full)
    use_liger(model, setup.parallel, torch.device(setup.device))
    if isinstance(setup.tuning, LoraSettings):
        model = lora.new_adapter(model, setup.tuning, seed=0)
    policy = PolicyModule(model, compute_dtype=setup.dtype)
    return parallelize(policy, setup.parallel, World())
