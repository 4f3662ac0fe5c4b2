"""A vocabulary cut between processes, played by threads of which one computes at a time; all wait in an exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from macpo.kernels import VocabShard

T_ = TypeVar("T_")
CUT = ("weight", "bias", "lora_b")  # inputs of which each process has its tokens' rows


def on_parts(size: int, vocab: int, body: Callable[[VocabShard], T_]) -> list[T_]:
    """What `body` returns for each part. An exchange that not all take part in raises BrokenBarrierError."""
    computes, barrier = threading.Lock(), threading.Barrier(size, timeout=20)
    sent: list[Tensor] = [torch.empty(0)] * size

    def exchange(rank: int, reduce: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        sent[rank] = x.detach().clone()
        computes.release()
        try:
            barrier.wait()
            assert all(other.shape == x.shape and other.dtype == x.dtype for other in sent)
            result = reduce(torch.stack(sent))
            barrier.wait()
        finally:
            computes.acquire()
        return result

    def total(parts: Tensor) -> Tensor:
        wide = torch.promote_types(parts.dtype, torch.float32)
        return parts.sum(dim=0, dtype=wide).to(parts.dtype)

    def run(rank: int) -> T_:
        with computes:
            try:
                return body(
                    VocabShard(
                        vocab,
                        rank,
                        size,
                        maximum=lambda x: exchange(rank, lambda parts: parts.amax(dim=0), x),
                        total=lambda x: exchange(rank, total, x),
                    )
                )
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def part_of(tensors: dict[str, Tensor], shard: VocabShard) -> dict[str, Tensor]:
    """One process's inputs."""
    own = slice(shard.first, shard.first + shard.count)
    return {name: x[own] if name in CUT else x for name, x in tensors.items()}


def assembled(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the whole inputs; of what every process has, theirs, which must be equal to the bit."""
    for name, grad in parts[0].items():
        assert name in CUT or all(torch.equal(part[name], grad) for part in parts), name
    return {name: torch.cat([part[name] for part in parts]) if name in CUT else grad for name, grad in parts[0].items()}
