"""Which groups form which step, on which rank: functions of counts, lengths and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, bins, pack
from macpo.engine.distributed.world import World


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """The order in which a stage's groups form batches, one per step."""

    num_groups: int
    batch: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch, including a smaller last batch."""
        return -(-self.num_groups // self.batch)

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def order(self, epoch: int) -> list[int]:
        """The groups of an epoch, shuffled by seed and epoch alone."""
        digest = hashlib.sha256(f"order:{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(self.num_groups, generator=generator).tolist()

    def steps(self, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Yield (step, indices of its groups), beginning with step `start`."""
        for epoch in range(start // self.steps_per_epoch, self.epochs):
            order = self.order(epoch)
            for k in range(self.steps_per_epoch):
                step = epoch * self.steps_per_epoch + k
                if step >= start:
                    yield step, order[k * self.batch : (k + 1) * self.batch]


def shares(groups: Sequence[PrefixGroup], indices: Sequence[int], size: int) -> list[list[int]]:
    """The groups of a step by rank: longest first to the rank with the fewest tokens."""
    if size == 1:
        return [list(indices)]
    found: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for i in sorted(indices, key=lambda i: (-groups[i].num_tokens, i)):
        rank = loads.index(min(loads))
        found[rank].append(i)
        loads[rank] += groups[i].num_tokens
    return found


def share(groups: Sequence[PrefixGroup], indices: Sequence[int], world: World) -> list[int]:
    """This rank's groups of a step."""
    return shares(groups, indices, world.size)[world.rank]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward and backward; a filler keeps a rank in step with the others and adds nothing."""

    batch: PackedBatch
    filler: bool = False


def microbatches(
    groups: Sequence[PrefixGroup], indices: Sequence[int], max_tokens: int, world: World, *, collective: bool
) -> list[MicroBatch]:
    """This rank's part of a step, packed.

    Args:
        indices: the step's groups, over all ranks.
        max_tokens: token budget of a micro-batch, the same on every rank.
        world: the ranks with different groups.
        collective: whether forwards are collective, so that each rank needs the same number: a rank with fewer repeats
            the step's shortest group as a filler. Each rank computes that number without communication.
    """
    parts = shares(groups, indices, world.size)
    packed = pack(groups, max_tokens=max_tokens, indices=parts[world.rank])
    found = [MicroBatch(batch) for batch in packed]
    if collective:
        most = max(len(bins(groups, max_tokens=max_tokens, indices=part)) for part in parts)
        if len(found) < most:
            shortest = min(indices, key=lambda i: (groups[i].num_tokens, i))
            (batch,) = pack(groups, max_tokens=1, indices=[shortest])
            found += [MicroBatch(batch, filler=True)] * (most - len(found))
    return found
