"""Counts the kernels that a GPU would be given, on tensors of any device: one an operator that is no view."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
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


def kernels_of(run: Any) -> Counter[str]:
    """The kernels of one call without gradients."""
    with torch.no_grad(), Kernels() as found:
        run()
    return found.names
