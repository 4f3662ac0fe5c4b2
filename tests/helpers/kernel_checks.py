"""What the operators' tests share: the one table of tolerances, and the backends that exist here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from macpo.kernels import native, triton_support

# Largest error allowed, relative to the float64 reference in the Euclidean norm. float32: sums of up to 1e3 terms,
# unit roundoff 6e-8. 16-bit: outputs are rounded once (half a unit: 2e-3 and 2.4e-4) and gradients go through
# dlogits rounded to the same dtype, so twice that.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.module is None, reason=native.why_absent or "native extension is built")
)
BACKENDS = ["torch", NATIVE]
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not triton_support.INSTALLED or not (torch.cuda.is_available() or triton_support.interpreted()),
        reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
    ),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; the interpreter takes CPU tensors


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "value", floor: float = 0.0) -> None:
    """||actual - expected|| <= tolerance * max(||expected||, floor), in float64; absolute where that maximum is 0.

    `floor` is for results that are differences of numbers of that size (1 - p of a confident row), whose rounding
    stays when the difference vanishes.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    size = max(expected.double().norm().item(), floor) or 1.0
    error = (actual.double() - expected.double()).norm().item() / size
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e} above {TOLERANCE[dtype]:.0e}"


def poisoned(inner: Tensor, value: float, pad: int = 3) -> tuple[Tensor, Callable[[], bool]]:
    """`inner` as a view into a larger buffer full of `value`, and a function that says whether the rest still is."""
    shape = [size + 2 * pad for size in inner.shape]
    buffer = torch.full(shape, value, dtype=inner.dtype, device=DEVICE)
    place = tuple(slice(pad, -pad) for _ in shape)
    buffer[place] = inner
    outside = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    outside[place] = False
    before = buffer[outside].clone()
    return buffer[place], lambda: torch.equal(buffer[outside].view(torch.uint8), before.view(torch.uint8))


def framed(x: Tensor, lanes: bool = False) -> tuple[Tensor, Callable[[], Tensor]]:
    """x at an odd place of a NaN buffer with padded rows (columns where `lanes`), and what surrounds it."""
    rows = x.T if lanes else x
    height, width = rows.shape
    buffer = torch.full((1 + (height + 1) * (width + 3),), float("nan"), dtype=x.dtype)
    view = buffer[1 : 1 + height * (width + 3)].view(height, width + 3)[:, :width]
    view.copy_(rows)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[1 : 1 + height * (width + 3)].view(height, width + 3)[:, :width] = True
    return (view.T if lanes else view), lambda: buffer[~inside]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
