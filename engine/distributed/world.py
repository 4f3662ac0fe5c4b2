"""The processes (ranks) of one job and their collectives.

Without torch.distributed there is one process and every call is a no-op. Under torchrun gloo carries CPU tensors and
NCCL those on GPUs. Objects are sent as JSON, so nothing that a peer sends is ever executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from macpo.engine.errors import ConfigError, PeerError, one_line
from macpo.engine.processes import killed_by_sigterm


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank among `size` ranks; `group` is their process group, None that of all processes."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank. Raises PeerError if one is gone or too late."""
        if self.size > 1:
            with _peer_errors("barrier"):
                dist.all_reduce(torch.zeros(1), group=self.group)  # a CPU tensor: gloo, also where NCCL serves the GPUs

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a float tensor over the ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            with _peer_errors("sum"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """Stack the ranks' tensors of equal shape (at least one axis): [size, *shape] on every rank."""
        if self.size == 1:
            return tensor[None]
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        with _peer_errors("stack"):
            dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out.view(self.size, *tensor.shape)

    def follow_(self, *tensors: Tensor) -> None:
        """Copy rank 0's values into the tensors, in place."""
        if self.size > 1:
            with _peer_errors("follow"):
                for tensor in tensors:
                    dist.broadcast(tensor, group=self.group, group_src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank, on every rank (tuples come back as lists)."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _peer_errors("gather"):
            length = torch.tensor([data.numel()])
            lengths = [torch.zeros(1, dtype=length.dtype) for _ in range(self.size)]
            dist.all_gather(lengths, length, group=self.group)
            longest = max(int(n) for n in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: data.numel()] = data
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self.group)
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, lengths, strict=True)]

    def any_of(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """A collective function that says whether `asked` is true on any rank."""
        return asked if self.size == 1 else lambda: any(self.gather(asked()))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        return self.gather(value if self.is_main else None)[0]


ALONE = World()
"""This process without others."""


def team_of(world: World, size: int) -> World:
    """This rank's tensor-parallel group of `size` consecutive ranks; collective."""
    if size == 1:
        return World()
    teams = _teams(dist.group.WORLD, world.size, size)
    return World(world.rank % size, size, teams[world.rank // size])


@lru_cache(maxsize=16)
def _teams(job: dist.ProcessGroup, ranks: int, size: int) -> list[dist.ProcessGroup]:
    """Process groups of `size` consecutive ranks, created once per `job`, which is only part of the cache key."""
    return [dist.new_group(list(range(start, start + size))) for start in range(0, ranks, size)]


@contextmanager
def _peer_errors(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's distributed errors derive from it
        why = one_line(error)
        fix = "look at the first failing rank's message, then run the same command again"
        raise PeerError(f"another rank failed or hangs, noticed in {what} ({why})", fix) from error


def init_from_env(timeout_s: float = 1800.0) -> World:
    """Join the process group that torchrun describes in the environment; without one, a single process.

    Args:
        timeout_s: how long a collective waits for a silent peer.

    Raises:
        ConfigError: RANK or WORLD_SIZE is not a number. PeerError: the other ranks could not be reached.
    """
    if dist.is_available() and dist.is_initialized():
        return World.current()
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE or RANK is not a number ({error})", "start with torchrun") from error
    if size == 1:
        return World()
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", str(rank))) % torch.cuda.device_count())
    with killed_by_sigterm(), _peer_errors("rendezvous"):  # a peer that has been stopped never comes
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    return World(rank, size)


def finish() -> None:
    """Leave the process group; does nothing in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
