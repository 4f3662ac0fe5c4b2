"""Stated specifications of the GPUs that plans and MFU support, and the memory of this machine.

Sources, all for the SXM boards, dense (NVIDIA's tables print bf16 "with sparsity", which is twice the dense figure):
A100 80GB datasheet (2021); H100 datasheet and Hopper white paper (2022); H200 datasheet (2023); Blackwell datasheet,
HGX B200 (2024). Memory: what the driver reports as total (nvidia-smi), which is less than the chips hold.
Network: one NIC a GPU of NVIDIA's own 8-GPU systems: DGX A100 200 Gb/s, DGX H100, H200 and B200 400 Gb/s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use: control groups of version 2 and 1."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU's stated peaks."""

    name: str
    """Name in recipes and in `macpo plan --gpu`."""
    device_name: str
    """Name in torch.cuda.get_device_name; other boards of the same chip have other clocks and do not match."""
    bf16_flops: float
    """Dense bfloat16 tensor-core FLOP/s, a multiply-add counted as two."""
    float32_flops: float
    """Float32 FLOP/s without tensor cores."""
    memory_bytes: int
    """Total memory that the driver reports."""
    bandwidth_bytes_per_s: float
    """Bandwidth of the device memory."""
    nvlink_bytes_per_s: float
    """Bandwidth to the other GPUs of its node, each way."""
    network_bytes_per_s: float
    """Bandwidth to other nodes, each way."""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 81920 * MIB, 2.039e12, 300e9, 25e9),
        Gpu("H100", "NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12, 81559 * MIB, 3.35e12, 450e9, 50e9),
        Gpu("H200", "NVIDIA H200", 989.4e12, 66.9e12, 143771 * MIB, 4.8e12, 450e9, 50e9),
        Gpu("B200", "NVIDIA B200", 2250e12, 75e12, 183359 * MIB, 7.7e12, 900e9, 50e9),
    )
}


def of_device(device: torch.device | str) -> Gpu | None:
    """The entry for a device of this machine; None for CPUs and for GPUs that are not in the table."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS.values() if gpu.device_name == found), None)


def host_memory(limits: Sequence[Path] = CONTAINER_LIMITS) -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where a container is limited."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            found.append(int(path.read_text()))
    return min(found)
