"""Classifies exceptions of torch: memory ran out, or another rank is gone; and gives memory back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import WeakMethod

import torch
import torch.distributed as dist

_MEMORY = (
    "out of memory",  # CUDA's own, where the allocator of torch was not asked
    "DefaultCPUAllocator",  # on CPUs torch raises a plain RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_PEER = ("/gloo/", "[Gloo]", "NCCL", "Connection closed by peer", "Connection reset by peer")
_spare: list[WeakMethod[Callable[[], bool]]] = []


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


def when_memory_runs_out(give_up: Callable[[], bool]) -> None:
    """Have `make_room` call a method, for as long as its object lives; it returns whether it gave anything up."""
    _spare.append(WeakMethod(give_up))


def free_memory() -> None:
    """Free what is no longer used; call it outside the `except` block, whose traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_room() -> bool:
    """Free a failed attempt's memory, and what is kept for later; call it as `free_memory` is called.

    Returns whether something kept for later was given up, so that the same attempt may succeed now.
    """
    free_memory()
    _spare[:] = [each for each in _spare if each() is not None]
    gave = [give_up() for each in _spare if (give_up := each()) is not None]
    return any(gave)
