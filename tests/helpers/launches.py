"""Counts the kernels that a GPU would be given, on tensors of any device: one an operator that is no view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
