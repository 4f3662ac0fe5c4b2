"""Where work runs: device, dtype and memory budget of a process, from ComputeSettings."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from transformers import PretrainedConfig

from macpo.engine.config import ComputeSettings
from macpo.engine.errors import ConfigError
from macpo.engine.hardware import host_memory
from macpo.engine.models.model_cache import ModelCache

AUTO_BATCH = 256
"""Sequences decoded together. A step reads every weight once: below some 180 rows an H200's products wait for it. On a
CPU a small model waits for the operators of a step: 384 responses by models 64 and 128 wide took .57 and .67 of
their time with 64 sequences."""
CPU_CACHE_BYTES, CPU_LEAST_BATCH = 2**30, 64
"""Keys and values that a CPU's batch may have, and how many sequences are decoded together whatever they take."""
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


def generation_batch(compute: ComputeSettings, model: PretrainedConfig | None = None, tokens: int = 0) -> int:
    """How many sequences are decoded together.

    Args:
        model: where it is given, a CPU takes no more than its keys and values leave room for.
        tokens: of the longest prompt with its response.
    """
    if compute.generation_batch != "auto":
        return compute.generation_batch
    if model is None or not tokens or device_of(compute).type != "cpu":
        return AUTO_BATCH
    fitting = CPU_CACHE_BYTES // (tokens * _cached_bytes(model, dtype_of(compute)))
    return min(AUTO_BATCH, max(CPU_LEAST_BATCH, fitting))


def _cached_bytes(model: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    text: Any = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def wave_requests(compute: ComputeSettings, device: str | None = None) -> int:
    """How many requests are committed to disk together; `device` is "cpu" or "cuda", by default this process's."""
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
