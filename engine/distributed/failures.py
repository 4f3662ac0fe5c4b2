"""Classifies exceptions of torch: memory ran out, or another rank is gone."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

_MEMORY = (
    "out of memory",  # CUDA's own, where the allocator of torch was not asked
    "DefaultCPUAllocator",  # on CPUs torch raises a plain RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_PEER = ("/gloo/", "[Gloo]", "NCCL", "Connection closed by peer", "Connection reset by peer")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed inside the model, where no `World` translates the error."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER)


def free_memory() -> None:
    """Free a failed attempt's memory; call it outside the `except` block, whose traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
