"""Liger's Triton kernels for RMSNorm, RoPE and the gated MLP (arXiv 2410.10989), on GPUs where they are installed.

They belong to a model, not to the process: `use_liger` changes the forwards of one model's modules, and copies of the
model have them too. CPU tensors go through the family's own code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.config import ParallelSettings

_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the head and its loss are macpo.kernels'


def why_not(model_type: str, settings: ParallelSettings, device: torch.device) -> str | None:
    """Why Liger's modules are not used; None if they are."""
    if settings.liger == "off":
        return "compute.parallel.liger is off"
    if device.type != "cuda":
        return f"its kernels do not run on {device.type}"
    if settings.tensor > 1:
        return "its kernels do not take the tensors of tensor parallelism"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return None if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has none for {model_type}"


def use_liger(model: PreTrainedModel, settings: ParallelSettings, device: torch.device) -> bool:
    """Put Liger's kernels into the model's modules unless `why_not` gives a reason; returns whether it did.

    Call it once, where the weights are loaded, so that whatever scores, generates or trains with them computes alike.
    """
    if why_not(model.config.model_type, settings, device) is not None:
        return False
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    families = {type(module).__module__ for module in model.modules()}
    before = {name: dict(vars(sys.modules[name])) for name in families if name.startswith("transformers.")}
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    _apply_liger_kernel_to_instance(model, **_OURS)
    functions = {name: _restored(sys.modules[name], own) for name, own in before.items()}
    for module, former in forwards.items():
        fused = vars(module).get("forward")
        if fused is not former and fused is not None:
            module.forward = MethodType(_by_device(fused.__func__, type(module).forward, is_method=True), module)
        elif rebound := _rebound(type(module).forward, functions.get(type(module).__module__, {})):
            module.forward = MethodType(rebound, module)
    return True


def _restored(family: ModuleType, before: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Undo what Liger replaced in a family's module, for every model of the process; returns its functions there."""
    changed = {name: value for name, value in vars(family).items() if before.get(name) is not value}
    for name in changed:
        if name in before:
            setattr(family, name, before[name])
        else:
            delattr(family, name)
    return {
        name: _by_device(value, before[name], is_method=False)
        for name, value in changed.items()
        if name in before and inspect.isroutine(value)
    }


def _rebound(forward: Any, functions: Mapping[str, Callable[..., Any]]) -> FunctionType | None:
    """A copy of a forward for which these are the functions of its module; None if it calls none of them.

    The globals have no `__name__`: torch.compile would look functions up in the module of that name.
    """
    plain: Any = inspect.unwrap(forward)
    used = {name: functions[name] for name in plain.__code__.co_names if name in functions}
    if not used:
        return None
    scope = {name: value for name, value in plain.__globals__.items() if name != "__name__"} | used
    copy = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy


def _by_device(fused: Callable[..., Any], plain: Callable[..., Any], *, is_method: bool) -> Callable[..., Any]:
    """Liger's function where its first tensor is on a GPU, and the family's own elsewhere."""

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if runs_on(x) else plain)(x, *args, **kwargs)

    def method(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if runs_on(x) else plain)(self, x, *args, **kwargs)

    return method if is_method else function


def runs_on(x: Tensor) -> bool:
    """Whether Liger's kernels take the tensor."""
    return x.is_cuda
