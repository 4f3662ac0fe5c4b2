"""LoRA adapters of one base in one batch, by stacked rank: y = x W' + ((x A') * mask) B'.

A [R, in] stacks the adapters' factors by rows, B [out, R] by columns; R is the sum of their ranks. The mask [T, R]
holds each token's scaling in the columns of its own adapter and 0 elsewhere; a single adapter has its scaling and no
mask. That takes two dense products of fixed shape and no sorting of rows; n adapters cost about
n r (in + out) / (in out) of the base's product. The stacks are kept for a run in the dtype of the layer's products, so
that no step casts them.
Legend: T tokens of the packed row, R stacked rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from macpo.engine.models.tuning.lora_linear import FusedLinear
from macpo.kernels.transfer import to_device
from macpo.kernels.wide_products import is_emulated

Layout = tuple[tuple[int, float], ...]  # (rank, scaling) of each adapter in a layer; rank 0 where it has none


@dataclass(slots=True)
class _Stack:
    """A layer's stacked factors."""

    layout: Layout
    a: Tensor  # [R, in]
    b: Tensor  # [out, R]

    @property
    def kind(self) -> tuple[object, ...]:
        """What is unchanged while only weights change."""
        return self.layout, self.a.dtype, self.a.device


class StackedAdapters:
    """The named adapters of a peft model, stacked so that each token uses its own.

    Args:
        model: a peft model in eval mode with its adapters loaded and not merged.
        names: the adapters' names in peft.
        labels: the names that requests use (None: the active adapter); default `names`.

    Raises:
        ValueError: the adapters cannot share a batch, for the reason that `why_not` gives.
    """

    def __init__(self, model: PeftModel, names: Sequence[str], labels: Sequence[str | None] | None = None) -> None:
        reason = why_not(model)
        if reason:
            raise ValueError(reason)
        self._model = model
        self.names = tuple(names)
        self.labels = tuple(names if labels is None else labels)
        self._layers = _lora_layers(model)
        self._stacks = {id(layer): self._stack(layer) for layer in self._layers}
        layouts = {stack.layout for stack in self._stacks.values()} if len(self.names) > 1 else set()
        self._tables = {layout: _table(layout).to(model.device) for layout in layouts}
        self._masks: dict[Layout, Tensor] = {}

    def index(self, label: str | None) -> int:
        """Index of an adapter, for `select`."""
        return self.labels.index(label)

    def assign(self, labels: Sequence[str | None]) -> None:
        """Sets the adapter of each of the T tokens of the next forwards."""
        if self._tables:
            self.select(to_device(torch.tensor([self.index(label) for label in labels]), self._model.device))

    def select(self, index: Tensor) -> None:
        """Like `assign`, by the adapters' indices [T] int64, which stay on their device."""
        self._masks = {layout: table.index_select(0, index) for layout, table in self._tables.items()}

    def refresh(self) -> bool:
        """Copies the adapters' present weights into the same tensors; False where the shapes no longer fit."""
        layers = _lora_layers(self._model)
        if list(map(id, layers)) != list(self._stacks):
            return False
        pairs = [(self._stacks[id(layer)], self._stack(layer)) for layer in layers]
        if any(old.kind != new.kind for old, new in pairs):
            return False
        for old, new in pairs:
            old.a.copy_(new.a)
            old.b.copy_(new.b)
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model's linear modules use the stacks instead of peft's active adapter."""
        for layer in self._layers:
            vars(layer)["forward"] = partial(self._forward, layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    def _forward(self, layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = layer.base_layer
        out: Tensor = base(x, *args, **kwargs)
        stack = self._stacks[id(layer)]
        if not stack.a.shape[0]:
            return out
        narrow = x.to(stack.a.dtype).reshape(-1, x.shape[-1]) @ stack.a.T
        scaling = 1.0
        if len(self.names) == 1:
            ((_, scaling),) = stack.layout
        else:
            mask = self._masks[stack.layout]
            if x.shape[:-1] != (1, mask.shape[0]):
                raise ValueError(f"a layer sees {list(x.shape[:-1])} tokens where the packed row has {mask.shape[0]}")
            narrow.mul_(mask)  # float32, also where the stacks have 16 bits
        if out.dtype == narrow.dtype:
            out.view(-1, out.shape[-1]).addmm_(narrow, stack.b.T, alpha=scaling)
            return out
        return out + (narrow @ stack.b.T).mul_(scaling).to(out.dtype).view_as(out)

    def _stack(self, layer: Any) -> _Stack:
        own = [name if name in layer.lora_A else None for name in self.names]
        layout = tuple((0, 0.0) if name is None else (layer.r[name], float(layer.scaling[name])) for name in own)
        dtype = _dtype(layer)
        some = next(iter(layer.lora_A.values())).weight.to(dtype)
        a = [layer.lora_A[name].weight.detach() for name in own if name is not None]
        b = [layer.lora_B[name].weight.detach() for name in own if name is not None]
        return _Stack(
            layout,
            torch.cat(a).to(dtype) if a else some.new_zeros(0, layer.in_features),
            torch.cat(b, dim=1).to(dtype) if b else some.new_zeros(layer.out_features, 0),
        )


def _dtype(layer: Any) -> torch.dtype:
    """The dtype of a layer's products: that of its base where the device multiplies it, else that of the adapters."""
    own, weight = next(iter(layer.lora_A.values())).weight.dtype, layer.get_base_layer().weight
    plain = type(layer.get_base_layer()) is nn.Linear and not is_emulated(weight.dtype, weight.device)
    return weight.dtype if plain else own


def _lora_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _table(layout: Layout) -> Tensor:
    """[adapters, R]: each adapter's scaling in the columns of its own ranks, 0 elsewhere."""
    scalings = torch.tensor([scaling for _, scaling in layout])
    ranks = torch.tensor([rank for rank, _ in layout])
    return torch.diag(scalings).repeat_interleave(ranks, dim=1)


def why_not(model: nn.Module) -> str:
    """Why the model's adapters cannot share a batch; empty where they can."""
    if not isinstance(model, PeftModel):
        return "it is not a peft model"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is replaced as a whole by an adapter"
        if not isinstance(module, LoraLayer):
            continue
        if type(module) is not LoraLinear and type(module) is not FusedLinear:
            return f"{name} is a {type(module).__name__}"
        if module.merged:
            return f"an adapter is merged into {name}"
        if module.fan_in_fan_out:
            return f"{name} holds its weight transposed"
        if any(getattr(module, "use_dora", {}).values()) or getattr(module, "lora_variant", {}):
            return f"{name} has a variant of LoRA"
        if any(factor.bias is not None for factor in module.lora_B.values()):
            return f"{name} has a bias in its adapter"
    return ""


@contextmanager
def active_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Activates the named adapter of a peft model; restores the former one and which parameters require gradients."""
    if name is None:
        yield
        return
    before, needs = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        kept = set(map(id, needs))
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
