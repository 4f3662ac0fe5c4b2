"""What the operators' tests share: the one table of tolerances, the backends that exist here, rows, counted kernels."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macpo.kernels import Segments, native, triton_support

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


# --- packed rows of attention ---

LAYOUTS = {
    "one token": [(1, [])],
    "prompt": [(19, [])],
    "pairs": [(9, [5, 4]), (1, [1]), (6, [3, 7])],  # a block of 16 spans two groups
    "long": [(37, [20, 3, 1]), (5, [2])],  # prompt and response longer than blocks, blocks between them to skip
    "whole blocks": [(32, [16]), (16, [])],
}


def segments_of(layout):
    return Segments.from_lengths(LAYOUTS[layout]).to(DEVICE)


def qkvg(num_tokens, heads, kv_heads, head_dim, dtype=torch.float32, seed=0):
    """q, k, v and the output's gradient, each inside a buffer of NaN: a read beyond an end shows."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [between_nans(torch.randn(*shape, generator=g).to(dtype)) for shape in shapes]


def between_nans(x, margin=3):
    buffer = torch.full((x.shape[0] + 2 * margin, *x.shape[1:]), float("nan"), dtype=x.dtype, device=DEVICE)
    buffer[margin:-margin] = x
    return buffer[margin:-margin]


# --- the kernels that a GPU would be given, counted on tensors of any device ---

_NO_KERNEL = {
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::_local_scalar_dense",
    "aten::is_pinned",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::lift_fresh",
}
"""Operators without a kernel that are no views; a reshape that copies calls `clone`, which has one."""


class Kernels(TorchDispatchMode):
    """Counts, within the block, operators that launch a kernel; an operator of one's own counts as one.

    Attributes:
        names: how often each was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self._paused = 0

    @property
    def count(self) -> int:
        return sum(self.names.values())

    @contextmanager
    def as_one(self, name: str) -> Any:
        """Whatever runs within the block counts as one kernel of this name."""
        if not self._paused:
            self.names[name] += 1
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not self._paused and not is_view and name not in _NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """A function as one kernel forwards and one backwards, as Liger's are."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, function: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.kernels, ctx.function = kernels, function
        ctx.save_for_backward(*tensors)
        with kernels.as_one("liger"):
            return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with ctx.kernels.as_one("liger backward"), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.function(*inputs)
            found = torch.autograd.grad(out, inputs, grads if isinstance(out, tuple) else grads[0], allow_unused=True)
        return None, None, *found


def as_kernels(kernels: Kernels) -> Callable[..., Any]:
    """In the place of `liger._by_device`: the family's own functions, a kernel each; an MLP's products stay its own."""

    def by_device(fused: Any, own: Any, *, is_method: bool) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            module, *tensors = args if is_method else (None, *args)
            if not hasattr(module, "down_proj"):
                call = partial(own, module) if is_method else own
                return _Fused.apply(kernels, partial(call, **kwargs), *tensors)
            gate, up = module.gate_proj(tensors[0]), module.up_proj(tensors[0])
            return module.down_proj(_Fused.apply(kernels, lambda a, b: module.act_fn(a) * b, gate, up))

        return function

    return by_device


# --- Triton's interpreter ---


def find_builtins_once() -> None:
    """Find the builtins of Triton's language before the first call of a kernel; its interpreter does so in every one.

    That search is half of the interpreter's time. What it does with the builtins that it finds stays its own.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_attr = getattr(interpreter, "_patch_attr", None)
    if patch_attr is None or not hasattr(interpreter, "_patch_builtin"):  # another version searches in its own way
        return

    @functools.cache
    def builtins_of(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]

    def patch_builtin(place: Any, *rest: Any) -> None:
        names = builtins_of(place)
        if not names or not tl.core.is_builtin(getattr(place, names[0])):  # an outer call has replaced them all
            return
        for name in names:
            member = getattr(place, name)
            if tl.core.is_builtin(member):
                patch_attr(place, name, member, *rest)

    for place in (tl, tl.core, tl.tensor, tl.math):  # while none of them is replaced
        builtins_of(place)
    interpreter._patch_builtin = patch_builtin


if triton_support.INSTALLED and triton_support.interpreted():
    find_builtins_once()
