"""What a result was measured on, and the two ceilings it is compared with: the vendor's GEMM and a copy."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels"),
    *("flash-attn", "flashinfer-python"),
)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Name the device: "NVIDIA H200"; a CPU's model and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        model = found[1] if found else model
    threads = torch.get_num_threads()
    return f"CPU {model}, {threads} thread{'s' if threads > 1 else ''}"


def device_slug(device: torch.device) -> str:
    """Return the folder name of a device's results: "nvidia-h200", "cpu-amd-epyc-2-threads"."""
    return slug_of(device_name(device))


def slug_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def provenance(device: torch.device) -> dict[str, Any]:
    """Return commit, device, versions and date, for a result file."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def _commit() -> str:
    """Return the commit's hash, "-dirty" if a tracked file outside bench/results differs; outside git what the
    environment gives as BENCH_COMMIT, or "".
    """
    try:
        commit = subprocess.check_output(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        )
        status = subprocess.check_output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "")
    changed = [line for line in status.splitlines() if not line[3:].startswith("bench/results/")]
    return commit.strip() + ("-dirty" if changed else "")


def gemm(a: Tensor, b: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    """Return a call of the vendor's a @ b' in the inputs' dtype: 2 * rows * columns * depth FLOP."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype, device=a.device)
    a, b = a.detach(), b.detach()
    return lambda: {"product": torch.mm(a, b.T, out=out)}


def copy(num_bytes: int, device: torch.device) -> Callable[[], Mapping[str, Tensor]]:
    """Return a copy that moves `num_bytes` in all, half of them read and half written."""
    source = torch.ones(max(1, num_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: {"copied": target.copy_(source)}
