"""AdamW with a schedule and a global gradient norm, over named parameters, saved by name.

AdamW: Loshchilov & Hutter, arXiv 1711.05101; torch's fused kernel. Only matrices get weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from macpo.engine.config import OptimSettings
from macpo.engine.distributed.world import World
from macpo.engine.errors import IntegrityError
from macpo.engine.training.shards import part_of


def learning_rate(settings: OptimSettings, step: int, num_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `num_steps`.

    Linear warm-up over round(warmup_fraction * num_steps) steps that reaches the peak on its last one, then constant,
    or a half cosine or a line that would reach 0 at step `num_steps`.
    """
    warmup = round(settings.warmup_fraction * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * factors[settings.schedule]


class Optimizer:
    """Gradients and moments of one stage's trainable parameters.

    AdamW is elementwise, so it sees this rank's shard of a DTensor as a plain tensor; only the norm is global.
    FSDP2 and tensor parallelism have already summed the gradients of sharded parameters.

    Args:
        parameters: name -> parameter, the same order on every rank.
        settings: betas, weight decay, max_grad_norm.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings) -> None:
        self._parameters = dict(parameters)
        self._list = list(parameters.values())
        self._locals = [_local_parameter(p) for p in self._list]
        self._max_norm = settings.max_grad_norm
        self._splits = [_split_axes(p) for p in self._list]
        matrices = [p for p in self._locals if p.dim() > 1]
        vectors = [p for p in self._locals if p.dim() <= 1]
        param_groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            param_groups,
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.zero()

    def zero(self) -> None:
        """Discard all gradients."""
        for parameter in (*self._list, *self._locals):
            parameter.grad = None

    def reduce(self, world: World, stats: Tensor) -> Tensor:
        """Sum gradients and `stats` (in place) over the ranks in float32; returns the global gradient norm (scalar).

        `world` holds the ranks with different groups of the step. A parameter that no group reached has gradient 0.
        """
        grads = [_local_gradient(p, local) for p, local in zip(self._list, self._locals, strict=True)]
        if world.size > 1:
            whole = [grad for grad, p in zip(grads, self._list, strict=True) if not isinstance(p, DTensor)]
            flat = world.sum_(torch.cat([stats, *(g.flatten().float() for g in whole)]))
            parts = flat[len(stats) :].split([g.numel() for g in whole])
            if whole:
                torch._foreach_copy_(whole, [part.view_as(g) for part, g in zip(parts, whole, strict=True)])
            stats.copy_(flat[: len(stats)])
        for local, grad in zip(self._locals, grads, strict=True):
            local.grad = grad
        return self._norm(grads)

    def _norm(self, grads: list[Tensor]) -> Tensor:
        norms = torch._foreach_norm(grads)
        total = norms[0].new_zeros((), dtype=torch.float32)
        for axes in dict.fromkeys(self._splits):
            part = torch.stack([n for n, mine in zip(norms, self._splits, strict=True) if mine == axes])
            squared = torch.linalg.vector_norm(part).float().square()
            for group in axes:
                dist.all_reduce(squared, group=group)
            total += squared
        return total.sqrt()

    def update(self, rate: float, norm: float) -> None:
        """Make one AdamW step with the gradients scaled down to `max_grad_norm`, then discard them."""
        if norm > self._max_norm:
            torch._foreach_mul_([p.grad for p in self._locals if p.grad is not None], self._max_norm / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.zero()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name, for a checkpoint; sharded ones are DTensors. Moments start at zero."""
        out: dict[str, Tensor] = {}
        for (name, parameter), local in zip(self._parameters.items(), self._locals, strict=True):
            state = self._adamw.state[local]
            if not state:  # AdamW's own initial state
                state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(local), torch.zeros_like(local)
            out[f"weight.{name}"] = parameter.detach()
            out[f"step.{name}"] = state["step"]
            for moment in ("exp_avg", "exp_avg_sq"):
                out[f"{moment}.{name}"] = part_of(parameter, state[moment].detach())
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a checkpoint's weights and moments; for a sharded parameter, whole tensors or DTensors like it.

        Raises:
            IntegrityError: names or shapes differ from this model's.
        """
        own = self.tensors()
        if set(own) != set(tensors):
            odd = sorted(set(own) ^ set(tensors))[0]
            raise IntegrityError(f"the checkpoint does not fit the model, first {odd}", "delete it to train again")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != tensors[name].shape:
                    raise IntegrityError(
                        f"{name} is {list(tensors[name].shape)} in the checkpoint, {list(tensor.shape)} in the model",
                        "delete it to train again",
                    )
                _local(tensor).copy_(_local(_shard_like(tensors[name], tensor)))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A plain parameter over the memory of this rank's shard, or the plain parameter itself."""
    return nn.Parameter(_local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def _local_gradient(parameter: nn.Parameter, local: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(local) if grad is None else _local(grad)


def _split_axes(parameter: nn.Parameter) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which this parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())


def _shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded like `like`; a DTensor unchanged."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
