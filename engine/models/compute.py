"""Where work runs: device, dtype and memory budget of a process, from ComputeSettings."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from macpo.engine.config import ComputeSettings
from macpo.engine.errors import ConfigError
from macpo.engine.hardware import host_memory
from macpo.engine.models.model_cache import ModelCache

AUTO_BATCH = {"cpu": 64, "cuda": 256}
"""Sequences decoded together. A step reads every weight once: below some 180 rows an H200's products wait for it."""
AUTO_WAVE = {"cpu": 256, "cuda": 2048}
"""Requests of a wave, at whose end the batch runs empty."""
RESIDENT_SHARE = 0.6
"""Share of the device's memory that loaded base models may take, unless the recipe sets `memory_gb`."""


def device_of(compute: ComputeSettings) -> torch.device:
    """The process's device, by local rank on GPUs. Raises ConfigError if a GPU is required and there is none."""
    if compute.device == "cpu" or (compute.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("no GPU can be used here", "set compute.device to auto or cpu", field="compute.device")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def dtype_of(compute: ComputeSettings) -> torch.dtype:
    """The dtype of frozen weights and activations."""
    if compute.dtype == "auto":
        return torch.float32 if device_of(compute).type == "cpu" else torch.bfloat16
    return torch.float32 if compute.dtype == "float32" else torch.bfloat16


def generation_batch(compute: ComputeSettings, device: str | None = None) -> int:
    """How many sequences are decoded together on a kind of device ("cpu" or "cuda"); default this process's."""
    if compute.generation_batch != "auto":
        return compute.generation_batch
    return AUTO_BATCH[device or device_of(compute).type]


def wave_requests(compute: ComputeSettings, device: str | None = None) -> int:
    """How many requests are committed to disk together; `device` as for `generation_batch`."""
    if compute.wave_requests != "auto":
        return compute.wave_requests
    return AUTO_WAVE[device or device_of(compute).type]


def memory_budget(compute: ComputeSettings) -> int:
    """Bytes that the base models loaded in one process may take: by default a share of what its device has.

    Parallel jobs share the device; on a CPU, so do the ranks of a node.
    """
    if compute.memory_gb is not None:
        return int(compute.memory_gb * 1e9)
    if device_of(compute).type == "cuda":
        total, ranks = torch.cuda.get_device_properties(device_of(compute)).total_memory, 1
    else:
        total, ranks = host_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(RESIDENT_SHARE * total / (compute.jobs * ranks))


@lru_cache(maxsize=1)
def model_cache(compute: ComputeSettings, trust_remote_code: bool) -> ModelCache:
    """This process's cache of base models, which stay loaded between stages."""
    return ModelCache(
        memory_budget(compute),
        dtype_of(compute),
        device_of(compute),
        parallel=compute.parallel,
        trust_remote_code=trust_remote_code,
    )
