"""`macpo env`: what a bug report needs to know of this installation and machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from macpo.engine.hardware import host_memory
from macpo.engine.run.manifest import code_version
from macpo.kernels.backend import IMPLEMENTED, BackendError, explain

PACKAGES = (
    *("torch", "transformers", "peft", "tokenizers", "safetensors", "datasets", "huggingface_hub", "numpy"),
    *("pydantic", "triton", "flash-attn", "liger-kernel", "bitsandbytes", "accelerate", "openai", "trl"),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "TRITON_INTERPRET"),
    *("MACPO_BACKEND", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "WORLD_SIZE"),
)
"""Environment variables that decide what runs; none of them holds a secret."""


def lines() -> Iterator[str]:
    """Versions, devices, and the backend of every kernel with the reason, a line each."""
    own = code_version()
    yield f"macpo: {own['version']}" + (f", commit {own['commit']}" if own["commit"] else "")
    yield f"python: {platform.python_version()} ({sys.executable})"
    yield f"system: {platform.platform()}"
    for name in PACKAGES:
        try:
            yield f"{name}: {version(name)}"
        except PackageNotFoundError:
            yield f"{name}: not installed"
    yield f"CUDA of torch: {torch.version.cuda or 'none'}"
    threads = f"{os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads"
    yield f"cpu: {threads}, {host_memory() / 1e9:.1f} GB, {torch.backends.cpu.get_cpu_capability()}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, sm_{gpu.major}{gpu.minor}"
    if not count:
        yield "cuda: no GPU can be used here"
    for device in ("cpu", *(["cuda"] if count else [])):
        for operator in IMPLEMENTED:
            yield f"kernel {operator} on {device}: {_backend(operator, device)}"
    for name in VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"


def _backend(operator: str, device: str) -> str:
    try:
        choice = explain(operator, device)
    except BackendError as error:
        return f"none: {error}"
    return f"{choice.backend}: {choice.why}"
