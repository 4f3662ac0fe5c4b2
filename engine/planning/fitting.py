"""Which settings train a model on given GPUs: each with memory and step time, best first, and why others do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings, microbatch_tokens
from macpo.engine.errors import ConfigError
from macpo.engine.hardware import Gpu
from macpo.engine.planning.memory import Memory, Row, Setup, checkpoint_bytes, memory, tensor_config
from macpo.engine.planning.step_time import Machine, StepTime, step_time

GPUS_PER_NODE = 8
HOST_BYTES = 200e9
"""Host memory of a rank: an eighth of 2 TB, minus what reading the data and the weights takes."""
_SIMPLE = ("replicate", "hybrid", "shard")
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "moments",
    "saved": "activations",
    "head": "the head's buffers",
    "scratch": "a block's buffers",
    "gathered": "gathered weights",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The data of one optimiser step."""

    pairs: int = 128
    prompt: int = 200
    """Mean tokens."""
    response: int = 80
    """Mean tokens of one response."""
    microbatch_tokens: int | Literal["auto"] = "auto"
    responses: int = 2
    """Responses per prompt: two for a pair, one for SFT."""

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.pairs * (self.prompt + self.responses * self.response)

    def rows(self, data_ranks: int, device: str) -> list[Row]:
        """The micro-batches of the busiest rank; `device` is "cpu" or "cuda"."""
        group = (self.prompt, (self.response,) * self.responses)
        left = -(-self.pairs // data_ranks)
        tokens = microbatch_tokens(self.microbatch_tokens, device)
        most = max(1, tokens // (self.prompt + self.responses * self.response))
        return [(group,) * min(most, left - done) for done in range(0, left, most)]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to train."""

    setup: Setup
    memory: Memory
    time: StepTime
    checkpoint: float
    """Bytes of a training checkpoint, over all ranks."""
    room: float
    """Memory of one GPU in bytes."""

    @property
    def fits(self) -> bool:
        return self.memory.device <= self.room and self.memory.host <= HOST_BYTES

    @property
    def why_not(self) -> str:
        """The largest part of the memory if it does not fit, else empty."""
        if self.fits:
            return ""
        name = max(_PARTS, key=lambda part: getattr(self.memory, part))
        return f"{getattr(self.memory, name) / 1e9:.0f} GB of {_PARTS[name]}"

    @property
    def four_bits(self) -> bool:
        return self.setup.four_bits


def option(config: PretrainedConfig, setup: Setup, machine: Machine, room: float, work: Workload) -> Option:
    """Memory and time of one setup. Raises ConfigError if the setup is impossible."""
    rows = work.rows(setup.data_ranks, setup.device)
    needed, time = memory(config, setup, rows[0], len(rows)), step_time(config, setup, machine, rows)
    return Option(setup, needed, time, checkpoint_bytes(config, setup), room)


def options(
    config: PretrainedConfig,
    gpu: Gpu,
    gpus: int,
    tuning: LoraSettings | FullSettings,
    work: Workload,
    *,
    machine: Machine | None = None,
) -> list[Option]:
    """Every combination of sharding, tensor parallelism, checkpointing and 4 bits, fitting ones first, by step time.

    Activations are offloaded only if nothing fits otherwise. Options that do not fit follow, least memory first.

    Raises:
        ConfigError: transformers does not know the model.
    """
    machine = machine or Machine.of_gpu(gpu)
    found = _tried(config, gpu, machine, work, list(_setups(config, gpus, tuning)))
    if not any(each.fits for each in found):
        offloaded = [
            replace(each.setup, parallel=each.setup.parallel.model_copy(update={"offload_activations": True}))
            for each in found
        ]
        found += [each for each in _tried(config, gpu, machine, work, offloaded) if each.fits]
    return sorted(found, key=_rank)


def _tried(
    config: PretrainedConfig, gpu: Gpu, machine: Machine, work: Workload, setups: Iterable[Setup]
) -> list[Option]:
    return [option(config, setup, machine, float(gpu.memory_bytes), work) for setup in setups]


def _rank(each: Option) -> tuple[Any, ...]:
    parallel = each.setup.parallel
    simple = (_SIMPLE.index(parallel.sharding), parallel.tensor, each.four_bits)
    # step times within 2% count as equal; then the simpler setup is better
    return (0, round(math.log(each.time.total) / 0.02), *simple) if each.fits else (1, each.memory.peak, *simple)


def _setups(config: PretrainedConfig, gpus: int, tuning: LoraSettings | FullSettings) -> Iterable[Setup]:
    node = min(gpus, GPUS_PER_NODE)
    shardings = ["replicate", *(["shard"] if gpus > 1 else []), *(["hybrid"] if gpus > GPUS_PER_NODE else [])]
    tunings = [tuning]
    if isinstance(tuning, LoraSettings) and tuning.quantization == "none":
        tunings.append(tuning.model_copy(update={"quantization": "nf4"}))
    for sharding, tensor, checkpointing, tuned in product(
        shardings, (1, 2, 4, 8), ("off", "selective", "full"), tunings
    ):
        packed = isinstance(tuned, LoraSettings) and tuned.quantization == "nf4"
        if tensor > node or gpus % tensor or (packed and tensor > 1) or not _splits(config, tensor):
            continue
        if sharding != "replicate" and gpus == tensor:  # nothing is left to shard over
            continue
        values = {"sharding": sharding, "tensor": tensor, "checkpointing": checkpointing}
        yield Setup(tuned, ParallelSettings.model_validate(values), torch.bfloat16, "cuda", gpus, node)


def _splits(config: PretrainedConfig, tensor: int) -> bool:
    try:
        tensor_config(config, tensor)
    except ConfigError:
        return False
    return True
