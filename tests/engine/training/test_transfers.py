"""What leaves the host in a step: few copies, all from pinned memory, so that none waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macpo.engine.data.pack import PrefixGroup, pack
from macpo.engine.generation.attention import packed_prompts
from macpo.engine.training.confidence import medians
from macpo.kernels import transfer
from macpo.kernels.pair_loss.chunked import Pairs
from macpo.kernels.pair_loss.losses import LossSettings

META = torch.device("meta")  # stands for a GPU: a copy to it is an operator of the same kind
GROUPS = [PrefixGroup([1, 2, 3], [[4, 5], [6, 7, 8]]), PrefixGroup([9], [[10], [11, 12]])]


class Copies(TorchDispatchMode):
    """Notes each tensor that leaves the CPU, and whether the copy waits."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.is_meta:
            self.made.append((args[0].data_ptr(), bool((kwargs or {}).get("non_blocking"))))
        if func is torch.ops.aten.copy_.default and args[1].device.type == "cpu" and out.is_meta:
            self.made.append((args[1].data_ptr(), len(args) > 2 and bool(args[2])))
        return out


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of what was pinned; there is no pinned memory without a GPU."""
    found: list[int] = []

    def pinned(x: Tensor, device: torch.device) -> Tensor:
        if x.device.type == "cpu" and device == META:
            found.append(x.data_ptr())
        return x

    monkeypatch.setattr(transfer, "pinned", pinned)
    return found


def test_a_batch_is_one_copy(pins: list[int]) -> None:
    """Eight tensors; they were eight copies from pageable memory, each of which waited."""
    (batch,) = pack(GROUPS, max_tokens=64)
    with Copies() as copies:
        moved = batch.to(META)
    assert copies.made == [(pins[0], True)]
    for name in ("input_ids", "position_ids", "rows", "target", "last"):
        own, there = getattr(batch, name), getattr(moved, name)
        assert (own.shape, own.dtype) == (there.shape, there.dtype)


def test_tensors_that_travel_together_keep_values_and_begin_aligned() -> None:
    (batch,) = pack(GROUPS, max_tokens=64)
    tensors = [batch.input_ids, batch.segments.prefix_end, batch.rows[:0], batch.last, torch.randn(3, 5)]
    moved = transfer.together(tensors, torch.device("cpu"))
    start = moved[0].data_ptr()
    for own, there in zip(tensors, moved, strict=True):
        assert torch.equal(own, there) and own.dtype == there.dtype
        assert (there.data_ptr() - start) % transfer.ALIGNMENT == 0


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_no_copy_of_a_loss_waits(ld_alpha: float | None, pins: list[int]) -> None:
    """Lengths, the sequence of each row, reference log-probs, weights."""
    (batch,) = pack(GROUPS, max_tokens=64)
    settings = LossSettings(ld_alpha=ld_alpha)
    with Copies() as copies:
        Pairs(batch.cu_rows.tolist(), torch.zeros(4), settings, 2, torch.empty(0, device=META))
        medians(torch.empty(8, device=META), batch.cu_rows)
    assert len(copies.made) == (4 if ld_alpha is None else 5)
    assert all(not_waiting and address in pins for address, not_waiting in copies.made)


def test_prompts_of_a_prefill_are_one_copy(pins: list[int]) -> None:
    with Copies() as copies:
        segments, last = packed_prompts([3, 5, 2], META)
    assert copies.made == [(pins[0], True)] and segments.num_tokens == 10 and last.shape == (3,)
