"""AdamW with a schedule and a global gradient norm, over named parameters, saved by name.

AdamW: Loshchilov & Hutter, arXiv 1711.05101; torch's fused kernel. Weight decay reaches matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from macpo.engine.config import OptimSettings
from macpo.engine.errors import IntegrityError
from macpo.engine.parallel import World

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(settings: OptimSettings, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`.

    Linear warm-up over round(warmup_fraction * num_steps) steps that reaches the peak on its last one, then constant,
    or a half cosine or a line that would be 0 at step `num_steps`.
    """
    warmup = round(settings.warmup_fraction * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * factors[settings.schedule]


class Optimizer:
    """Gradients and moments of one stage's trainable parameters.

    Args:
        parameters: name -> parameter, the same order on every rank.
        settings: betas, weight decay, max_grad_norm.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings) -> None:
        self._parameters = dict(parameters)
        self._list = list(parameters.values())
        self._max_norm = settings.max_grad_norm
        matrices = [p for p in self._list if p.dim() > 1]
        vectors = [p for p in self._list if p.dim() <= 1]
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
        """Forget all gradients."""
        for parameter in self._list:
            parameter.grad = None

    def reduce(self, world: World, stats: Tensor) -> Tensor:
        """Sum gradients and `stats` (in place) over the ranks in float32; returns the global gradient norm (scalar).

        A parameter that no group reached has gradient 0.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._list]
        if world.size > 1:
            flat = world.sum_(torch.cat([stats, *(g.flatten().float() for g in grads)]))
            sizes = [g.numel() for g in grads]
            parts = flat[len(stats) :].split(sizes)
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
            stats.copy_(flat[: len(stats)])
        for parameter, grad in zip(self._list, grads, strict=True):
            parameter.grad = grad
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def update(self, rate: float, norm: float) -> None:
        """One AdamW step with the gradients scaled down to `max_grad_norm`; forgets them afterwards."""
        if norm > self._max_norm:
            torch._foreach_mul_([p.grad for p in self._list if p.grad is not None], self._max_norm / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.zero()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name, for a checkpoint; before the first step the moments are 0."""
        out: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._adamw.state[parameter]
            if not state:  # as AdamW itself begins
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            out[f"weight.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                out[f"{moment}.{name}"] = state[moment].detach()
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's weights and moments back.

        Raises:
            IntegrityError: names or shapes that are not this model's.
        """
        expected = {f"{kind}.{name}" for name in self._parameters for kind in ("weight", *_MOMENTS)}
        if expected != set(tensors):
            odd = sorted(expected ^ set(tensors))[0]
            raise IntegrityError(f"the checkpoint does not fit the model, first {odd}", "delete it to train again")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
                self._adamw.state[parameter] = state
