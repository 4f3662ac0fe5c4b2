"""How calls are timed: peers take turns in rounds; on a GPU short operators run in CUDA graphs.

A timed stretch is several calls one after another, between two waits for the device. Operators that a decode step
runs in a CUDA graph are timed in one, where the peer lets itself be captured: without it Python's launches, not the
kernels, would be measured. A peer that is far behind leaves after two rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from bench.harness.device import synchronise

Outputs: TypeAlias = Mapping[str, Tensor]
Run: TypeAlias = Callable[[], Outputs]
T = TypeVar("T")

# A timed stretch is at least this long; shorter calls are repeated. On a GPU the first call of a stretch waits for
# Python's launches (.8 ms for a loss, by the times of two sizes), the others are launched while it runs, as in a
# training loop.
MIN_SECONDS = {"cpu": 2e-3, "cuda": 6e-2}


def calls_for(run: Run, device: torch.device, seconds: float) -> int:
    """Return how often a timed stretch calls `run`, which took about `seconds`."""
    if seconds > 10 * MIN_SECONDS[device.type]:
        return 1
    return max(1, int(MIN_SECONDS[device.type] / max(stretch(run, 1, device), 1e-7)))


def stretch(run: Run, num_calls: int, device: torch.device) -> float:
    """Return the seconds per call of several calls between two waits for the device."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / num_calls


def captured(run: Callable[[], T]) -> Callable[[], T]:
    """Return `run` as the replay of a CUDA graph; raises what the capture raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills the allocator's pools
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay


def in_graph(run: Run) -> tuple[Run, str]:
    """Return `captured(run)`, or `run` itself and why it cannot be captured."""
    try:
        return captured(run), ""
    except Exception as error:  # peers that read values back to the host cannot be captured
        torch.cuda.synchronize()
        return run, f"not in a CUDA graph: {' '.join(str(error).split())[:80]}"


SLOW = 2.5  # a peer this many times slower than ours has two rounds


def rounds_of(
    runs: Mapping[str, Run],
    num_calls: Mapping[str, int],
    device: torch.device,
    repeats: int,
    budget_s: float,
    ours: str,
) -> dict[str, list[float]]:
    """Return the seconds per call of each, by round; a peer that is far behind leaves after the second round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    begin = time.perf_counter()
    for number in range(repeats):
        if number >= 2 and time.perf_counter() - begin > budget_s:
            break
        if number == 2 and ours in taken:
            names = [name for name in names if min(taken[name]) < SLOW * min(taken[ours])]
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            taken[name].append(stretch(runs[name], num_calls[name], device))
    return taken
