"""Tensors of all ranks as safetensors files: each rank writes its part, any number of ranks reads them back.

A tensor is plain (every rank holds it whole) or a DTensor (FSDP2, tensor parallelism). A part is a box of the whole:
its start and shape. If several ranks hold the same part, one writes it; all write about as many bytes.

The files are those of torch's `HuggingFaceStorageWriter(save_distributed=True)`, whose reader takes them. They are not
written through it, because torch.distributed.checkpoint sends its plans from rank to rank as pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError
from macpo.engine.faults import point

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Incomplete(Exception):
    """The files lack a part of a tensor, or hold it in another shape than the manifest says."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: its first element's index in the whole, and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """The box that both cover, or None."""
        first = tuple(map(max, self.start, other.start))
        last = [min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)]
        shape = tuple(end - begin for begin, end in zip(first, last, strict=True))
        return Box(first, shape) if all(n > 0 for n in shape) else None

    def slices(self, part: Box) -> tuple[slice, ...]:
        """The slices of `part`, which lies inside this box, in a tensor that holds the box."""
        begins = [a - b for a, b in zip(part.start, self.start, strict=True)]
        return tuple(slice(begin, begin + n) for begin, n in zip(begins, part.shape, strict=True))


def code_of(name: str, tensor: Tensor) -> str:
    """safetensors' name of the tensor's dtype. Raises ConfigError if it has none."""
    if tensor.dtype not in _CODES:
        raise ConfigError(f"{name} is {tensor.dtype}, which safetensors cannot hold", "train in another dtype")
    return _CODES[tensor.dtype]


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, detached: the tensor itself, or a DTensor's shard."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def part_of(like: Tensor, local: Tensor) -> Tensor:
    """This rank's part as the DTensor that it is part of, placed like `like`; as it is if that is a plain tensor."""
    if not isinstance(like, DTensor):
        return local
    spec = like.device_mesh, like.placements
    return DTensor.from_local(local, *spec, run_check=False, shape=like.shape, stride=like.stride())


def box_of(name: str, tensor: Tensor) -> Box:
    """The box that this rank holds.

    Raises:
        ConfigError: a DTensor with a pending sum, or whose part is no box.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not part of the mesh
        return Box((0,) * tensor.dim(), (0,) * max(1, tensor.dim()))
    held = [torch.arange(n) for n in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise ConfigError(f"{name} is placed as {placement} and cannot be saved", "reduce it before it is saved")
        # FSDP over tensor parallelism: each of the `split_factor` later parts is distributed separately
        pieces = held[dim].chunk(getattr(placement, "split_factor", 1))
        held[dim] = torch.cat([_nth_chunk(each, tensor.device_mesh.size(axis), coordinate[axis]) for each in pieces])
    local = local_of(tensor)
    if any(len(h) and int(h[-1] - h[0]) != len(h) - 1 for h in held) or [len(h) for h in held] != list(local.shape):
        raise ConfigError(f"{name} is placed as {tensor.placements}, a part of it is no box", "shard it by rows")
    return Box(tuple(int(h[0]) if len(h) else 0 for h in held), tuple(local.shape))


def _nth_chunk(indices: Tensor, num: int, which: int) -> Tensor:
    """One rank's indices: DTensor distributes as torch.chunk does, so the last ranks may get none."""
    chunks = indices.chunk(num)
    return chunks[which] if which < len(chunks) else indices[:0]


@dataclass(frozen=True, slots=True)
class Share:
    """The boxes that this rank writes, by name, and the bytes that all ranks write together."""

    boxes: dict[str, Box]
    total_bytes: int


def share_of(tensors: Mapping[str, Tensor], world: World) -> Share:
    """Distribute the parts over the ranks; collective.

    Raises:
        ConfigError: a dtype or placement cannot be saved.
        IntegrityError: ranks hold different values of the same part, or no rank holds a part.
    """
    boxes = {name: box_of(name, tensor) for name, tensor in tensors.items()}
    sums = _checksums(tensors) if world.size > 1 else [0] * len(tensors)
    rows = [[name, box.start, box.shape, value] for (name, box), value in zip(boxes.items(), sums, strict=True)]
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    seen: dict[tuple[str, tuple[int, ...]], tuple[Box, int]] = {}
    held = dict.fromkeys(tensors, 0)
    for rank, part in enumerate(world.gather(rows)):
        for name, start, shape, value in part:
            box = Box(tuple(start), tuple(shape))
            if not box.num_elements:
                continue
            key = (name, box.start)
            if key not in seen:
                held[name] = held.get(name, 0) + box.num_elements
            if seen.setdefault(key, (box, value)) != (box, value):
                raise IntegrityError(
                    f"ranks {holders[key][0]} and {rank} hold different values of {name}: the copies drifted apart",
                    "go on from the last checkpoint; if it comes again, a rank's hardware or an operator is at fault",
                )
            holders[key].append(rank)
    for name, tensor in tensors.items():
        if held[name] != tensor.numel():
            problem = f"the ranks together hold {held[name]:,} of the {tensor.numel():,} elements of {name}"
            raise IntegrityError(problem, "save the same tensors on every rank")
    sizes = {key: box.num_elements * tensors[key[0]].element_size() for key, (box, _) in seen.items()}
    load = [0] * world.size
    mine = {}
    for key in sorted(sizes, key=lambda k: (-sizes[k], k)):
        owner = min(holders[key], key=lambda rank: (load[rank], rank))
        load[owner] += sizes[key]
        if owner == world.rank:
            mine[key[0]] = boxes[key[0]]
    return Share(mine, sum(load))


def _checksums(tensors: Mapping[str, Tensor]) -> list[int]:
    """One integer per tensor, the sum of its 64-bit words, which is the same for equal copies on every device."""
    sums = [_checksum(local_of(tensor)) for tensor in tensors.values()]
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, value in enumerate(sums):
        by_device[value.device].append(index)
    out = [0] * len(sums)
    for indices in by_device.values():  # one wait for each device
        for index, number in zip(indices, torch.stack([sums[i] for i in indices]).tolist(), strict=True):
            out[index] = number
    return out


def _checksum(part: Tensor) -> Tensor:
    flat = part.contiguous().flatten().view(torch.uint8)
    flat = flat if flat.storage_offset() % 8 == 0 else flat.clone()
    num_whole = flat.numel() // 8 * 8
    return flat[:num_whole].view(torch.int64).sum() + flat[num_whole:].sum(dtype=torch.int64)


def write(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> None:
    """Write this rank's parts `boxes` of `tensors` as one safetensors file and sync it to disk.

    Only one tensor at a time is copied to the CPU.
    """
    with open(path, "wb") as file:
        for index, block in enumerate(_blocks(tensors, boxes)):
            if index == 1 + len(boxes) // 2:
                point("checkpoint-torn")
            file.write(block.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(OSError, AttributeError):  # so that reading back reads the disk, not the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_back(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> dict[str, Any]:
    """Compare the file with the arguments of `write`; returns {"bytes", "sha256", "pieces": name -> [start, shape]}.

    Raises:
        IntegrityError: the disk returns other bytes.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(tensors, boxes):
            got = bytearray(block.numel())
            num_read = file.readinto(got)
            if num_read != len(got) or not torch.equal(torch.frombuffer(got, dtype=torch.uint8), block):
                raise IntegrityError("the disk gives back other bytes than were written", "check it", file=path)
            digest.update(got)
        num_bytes = file.tell()
    pieces = {name: [boxes[name].start, boxes[name].shape] for name in sorted(boxes)}
    return {"bytes": num_bytes, "sha256": digest.hexdigest(), "pieces": pieces}


def _blocks(tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> Iterator[Tensor]:
    """Yield the bytes of a safetensors file as [n] uint8 on the CPU: its header, then each tensor."""
    parts = {name: local_of(tensors[name]) for name in boxes}
    names = sorted(parts, key=lambda name: (-parts[name].element_size(), name))  # so that every tensor is aligned
    offsets = json.dumps({name: {"saved_offsets": boxes[name].start} for name in names})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": offsets}}
    end = 0
    for name in names:
        begin, end = end, end + parts[name].numel() * parts[name].element_size()
        shape = list(parts[name].shape)
        header[name] = {"dtype": code_of(name, parts[name]), "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    yield torch.frombuffer(bytearray(len(raw).to_bytes(8, "little") + raw), dtype=torch.uint8)
    for name in names:
        yield parts[name].cpu().contiguous().flatten().view(torch.uint8)


class Reader:
    """Context manager that reads parts of tensors from shard files that are already verified.

    Args:
        folder: the files' folder.
        pieces: file -> name -> box, from the manifest.
    """

    def __init__(self, folder: Path, pieces: Mapping[str, Mapping[str, Box]]) -> None:
        self._folder = folder
        self._where: dict[str, list[tuple[str, Box]]] = defaultdict(list)
        for file, boxes in pieces.items():
            for name, box in boxes.items():
                self._where[name].append((file, box))
        self._open: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def like(self, name: str, like: Tensor) -> Tensor:
        """The tensor with the placement, dtype and device of `like`; only this rank's part is read.

        Raises:
            Incomplete: the files do not hold all of it. SafetensorError: a file is not in safetensors format.
        """
        box = box_of(name, like)
        out = torch.empty(box.shape, dtype=like.dtype, device=local_of(like).device)
        done = 0
        for file, held in self._where[name] if box.num_elements else ():
            part = box.overlap(held)
            if part is not None:
                out[box.slices(part)] = self._read(file, name, held, part, like.dtype)
                done += part.num_elements
        if done != box.num_elements:
            raise Incomplete(f"{name} has {done:,} of {box.num_elements:,} elements")
        return part_of(like, out)

    def _read(self, file: str, name: str, held: Box, part: Box, dtype: torch.dtype) -> Tensor:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        opened = self._open[file]
        if name not in opened.keys():  # noqa: SIM118 - not a mapping
            raise Incomplete(f"{file} does not hold {name}")
        view = opened.get_slice(name)
        if tuple(view.get_shape()) != held.shape or DTYPES.get(view.get_dtype()) != dtype:
            raise Incomplete(f"{file} holds {name} in another shape or dtype")
        tensor: Tensor = opened.get_tensor(name) if part == held else view[held.slices(part)]
        return tensor
