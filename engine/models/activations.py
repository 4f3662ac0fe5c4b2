"""What a transformer block keeps for its backward: all, only its products, only its input; on the device or the host.

Each function changes how one block runs by replacing its `forward`; names of modules and parameters stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.tuning.lora_linear import LORA_LINEAR
from macpo.kernels.wide_products import WIDE_MM

_aten = torch.ops.aten
PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    LORA_LINEAR,
    WIDE_MM,
)
"""Operators whose results `selective` keeps, because they cost most to recompute; attention's share is small."""
COMPILED_VARIANTS = 64  # torch.compile caches by code object, which all models of a process share
_SMALL_BYTES = 1024  # smaller tensors are not worth a copy to the host


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's outermost transformer blocks.

    Raises:
        ConfigError: the architecture, which the message names, has none.
    """
    found = list(_outermost(model))
    if not found:
        problem = f"{type(model).__name__} has no blocks that can be sharded, checkpointed or compiled one by one"
        fix = "use compute.parallel with sharding replicate and the rest off, or another architecture"
        raise ConfigError(problem, fix, field="compute.parallel")
    return found


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)


def checkpoint_block(block: nn.Module, kind: str, model: PreTrainedModel) -> None:
    """`full`: keep the block's input, run it again in the backward; `selective`: keep the results of PRODUCTS too."""
    if kind == "off":
        return
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with attention_hook(model):  # the backward may run outside the block that the forward ran in
            return plain(*args, **kwargs)

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = checkpointed


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def compile_block(block: nn.Module, backend: str = "inductor") -> None:
    """Compile the block as one full graph for every length; blocks of one kind share the compiled code."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILED_VARIANTS)
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)


def offload_block(block: nn.Module) -> None:
    """Keep what the block saves for its backward, except weights, in host memory (pinned if there is a GPU)."""
    forward = block.forward

    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        store = _HostStore(block)
        with saved_tensors_hooks(store.pack, store.unpack):
            out = forward(*args, **kwargs)
        store.close()
        return out

    block.forward = offloading


class _HostStore:
    """Host copies of the tensors saved in one forward; a tensor that several operations save is copied once."""

    def __init__(self, block: nn.Module) -> None:
        weights = (p.to_local() if isinstance(p, DTensor) else p for p in block.parameters())
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._alive: list[Tensor] = []  # keeps addresses from being reused while they are compared

    def pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        plain = not isinstance(tensor, DTensor) and tensor.layout == torch.strided
        if not plain or tensor.nbytes < _SMALL_BYTES or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if key not in self._copies:
            pinned = tensor.device.type != "cpu"
            copy = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned
            )
            self._copies[key] = copy.copy_(tensor.detach(), non_blocking=pinned)
            self._alive.append(tensor)
        copy, device = self._copies[key], tensor.device
        return lambda: copy if copy.device == device else copy.to(device, non_blocking=True)

    @staticmethod
    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    def close(self) -> None:
        self._copies.clear()
        self._alive.clear()
