"""Measures the most memory that a call holds at once beyond what was there before and the tensors it returns.

CPU: torch's allocator events (its profiler reports each allocation with its address, those of compiled and custom
operators included), so the running sum leaves out exactly the storages that come back. Memory that is taken past
torch's allocator is seen by the second figure, the process' peak resident size; calls of many thousand operators, whose
trace would not fit, have that alone. CUDA: the caching allocator's peak, less the returned bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Peak:
    """Memory in bytes; `resident` is None where it was not asked for or the system does not report it."""

    extra: int
    """Most allocated bytes held at once, without returned tensors."""
    returned: int
    resident: int | None
    """Growth of the peak resident size, less the returned bytes; whole pages, so small calls are dominated by noise."""


def measure(
    run: Callable[[], Mapping[str, Tensor]], device: torch.device, resident: bool = True, traced: bool = True
) -> Peak:
    """Return the peak of a call of `run`, which has run before; on a CPU each of the two ways costs one call.

    Not `traced`, the resident size counts as `extra`, returned tensors and all.
    """
    gc.collect()
    if device.type == "cuda":
        return _cuda(run, device)
    extra, returned = _traced(run) if traced else (None, 0)
    gc.collect()
    grown = _resident_growth(run) if resident or not traced else None
    left = None if grown is None else max(0, grown - returned)
    return Peak(left or 0 if extra is None else extra, returned, left)


def _storages(outputs: Mapping[str, Tensor]) -> dict[int, int]:
    """Return address and bytes of every storage behind the tensors."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs.values()}


def _cuda(run: Callable[[], Mapping[str, Tensor]], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    torch.cuda.synchronize(device)
    grown = torch.cuda.max_memory_allocated(device) - before
    returned = sum(_storages(outputs).values())
    return Peak(max(0, grown - returned), returned, None)


def _traced(run: Callable[[], Mapping[str, Tensor]]) -> tuple[int, int]:
    """Return (extra, returned) from torch's allocator events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
    with tempfile.TemporaryDirectory(prefix="macpo-trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kept = _storages(outputs)
    return peak_of_events(events, kept), sum(kept.values())


def peak_of_events(events: Iterable[Mapping[str, Any]], kept: Mapping[int, int]) -> int:
    """Return the largest running sum of allocations in a trace, without those that are `kept` (address -> bytes)."""
    changes = [
        event["args"] for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    changes.sort(key=lambda change: change["Ev Idx"])
    last = {change["Addr"]: index for index, change in enumerate(changes)}  # the last event at an address
    held: dict[int, int] = {}
    now = peak = 0
    for index, change in enumerate(changes):
        address, num_bytes = change["Addr"], change["Bytes"]
        if num_bytes < 0:
            now -= held.pop(address, 0)  # what was there before the call is not its own
        elif not (address in kept and last[address] == index):
            held[address] = num_bytes
            now += num_bytes
            peak = max(peak, now)
    return peak


def _resident_growth(run: Callable[[], Mapping[str, Tensor]]) -> int | None:
    """Return the call's peak resident size less the size before it; None without Linux's /proc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    outputs = run()
    peak = _status("VmHWM")
    del outputs
    return peak - before


def _status(field: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}[field]
