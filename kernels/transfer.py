"""Small CPU tensors on their way to a device, without the host waiting for the device.

A copy from ordinary memory waits until the device has done all that was asked of it before; one from pinned memory is
put in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at which each of several tensors begins: kernels are specialised to what is aligned."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; itself where it is there.

    A CUDA graph would read the host's memory again at every replay, when it may hold something else; while one is
    captured the values are written by kernels that carry them, a run of equal values each.
    """
    if device.type == "cuda" and x.device.type == "cpu" and torch.cuda.is_current_stream_capturing():
        return filled(x, device)
    return pinned(x, device).to(device, non_blocking=True)


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors of any dtypes and shapes on a device, by one copy; they share its memory."""
    starts, size = [], 0
    for x in tensors:
        starts.append(size)
        size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = pinned(torch.empty(size, dtype=torch.uint8), device)
    for x, start in zip(tensors, starts, strict=True):
        _part(buffer, start, x).copy_(x)
    moved = buffer.to(device, non_blocking=True)
    return [_part(moved, start, x) for x, start in zip(tensors, starts, strict=True)]


def copy_in(target: Tensor, x: Tensor) -> None:
    """Write the CPU tensor x into memory of a device."""
    target.copy_(pinned(x.contiguous(), target.device), non_blocking=True)


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """x in pinned memory where it is about to leave the CPU for a GPU, else x."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def filled(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, by fills alone."""
    values, counts = x.unique_consecutive(return_counts=True)
    out, start = torch.empty(x.shape, dtype=x.dtype, device=device), 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        out[start : start + count].fill_(value)
        start += count
    return out


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
