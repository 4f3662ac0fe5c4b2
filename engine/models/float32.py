"""Runs a 16-bit model in float32 with the weights of one layer at a time: what it would compute without rounding.

The extra memory is that of the largest layer in float32 (or of the head), never that of a second model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_Saved = list[tuple[MutableMapping[str, Any], str, Tensor]]


def is_plain(model: nn.Module) -> bool:
    """Return whether every weight is a number of 16 bits or more, and none is stored in some code (4 bits, float8)."""
    kinds = (*SIXTEEN_BITS, torch.float32, torch.float64)
    return all(type(weight) is nn.Parameter and weight.dtype in kinds for weight in model.parameters())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Make forwards of a model compute in float32, from its 16-bit weights; the weights themselves stay as they are.

        A layer's weights become float32 when its forward starts and are 16 bits again when it ends. Weights that are no
    plain numbers (see `is_plain`) stay, and their layers compute as they do; so does what an embedding does to its
    rows (Gemma's scaling). Not for forwards with a backward.
    """
    units = dict(_units(model))
    saved: dict[nn.Module, _Saved] = {}
    handles: list[RemovableHandle] = []

    def widen(unit: nn.Module, args: Any) -> None:
        saved[unit] = _widened(units[unit])

    def restore(unit: nn.Module, args: Any, out: Any) -> None:
        for table, name, weight in saved.pop(unit, ()):
            table[name] = weight

    for unit in units:
        if isinstance(unit, nn.Embedding):  # often the largest table; its rows are widened after the look-up
            handles.append(unit.register_forward_hook(lambda _, args, out: out.float()))
        else:
            handles.append(unit.register_forward_pre_hook(widen))
            handles.append(unit.register_forward_hook(restore, always_call=True))
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # TF32 has 10 bits
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        for handle in handles:
            handle.remove()
        for unit in list(saved):
            restore(unit, None, None)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """What is widened together, by the module whose forward it is for.

    A decoder layer (an element of an outermost list) and an adapted layer are taken whole, because they may read their
    parts' weights themselves; outside of them each module takes its own weights.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((layer, list(layer.modules())) for layer in child)
        elif isinstance(child, BaseTunerLayer):
            yield child, list(child.modules())
        else:
            yield from _units(child)
    if _own(module):
        yield module, [module]


def _own(module: nn.Module) -> _Saved:
    """The 16-bit weights and buffers that are a module's own."""
    tables: tuple[MutableMapping[str, Any], ...] = (module._parameters, module._buffers)
    return [
        (table, name, weight)
        for table in tables
        for name, weight in table.items()
        if type(weight) in (nn.Parameter, Tensor) and weight.dtype in SIXTEEN_BITS
    ]


def _widened(parts: Iterable[nn.Module]) -> _Saved:
    """Replaces the 16-bit weights of modules by float32; returns where the old ones belong."""
    saved = [entry for part in parts for entry in _own(part)]
    for table, name, weight in saved:
        wide = weight.detach().float()
        table[name] = nn.Parameter(wide, requires_grad=False) if isinstance(weight, nn.Parameter) else wide
    return saved
