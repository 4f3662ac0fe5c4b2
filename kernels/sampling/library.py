"""sample as an operator of torch: `torch.compile` and graph capture see one call.

Eager calls go straight to `run_sample`, which is cheaper; it checks values where no device has to be waited for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.backend import explain
from macpo.kernels.sampling import torch_impl
from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.philox import ATTEMPT_BITS, POSITION_BITS, SAMPLE_BITS

MAX_POSITION, MAX_ATTEMPT, MAX_SAMPLE = 2**POSITION_BITS - 1, 2**ATTEMPT_BITS - 1, 2**SAMPLE_BITS - 1


def run_sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `op.sample` after its checks of shapes."""
    batch = logits.shape[0]
    if request_keys.device.type == "cpu" and batch:
        _check_keys(request_keys, positions)
    choice = explain("sample", logits.device, backend)
    if not batch:
        return positions.clone(), logits.new_empty(0, dtype=torch.float32), logits.new_empty(0, dtype=torch.float32)
    if choice.backend == "triton":
        from macpo.kernels.sampling import triton_impl

        return triton_impl.sample(logits, params, request_keys, positions)
    if choice.backend == "native":
        return native.sample(logits, params, request_keys, positions)
    return torch_impl.sample(logits, params, request_keys, positions)


def _check_keys(request_keys: Tensor, positions: Tensor) -> None:
    """Counter fields must not spill into one another: that would repeat noise."""
    highest = (2**63 - 1, MAX_SAMPLE, MAX_ATTEMPT)
    low, high = request_keys.amin(0).tolist(), request_keys.amax(0).tolist()
    for name, smallest, largest, limit in zip(("request id", "sample", "attempt"), low, high, highest, strict=True):
        if smallest < 0 or largest > limit:
            raise ValueError(f"{name} must be in 0..{limit}, got {smallest}..{largest}")
    first, last = (int(value) for value in positions.aminmax())
    if first < 0 or last > MAX_POSITION:
        raise ValueError(f"positions must be in 0..{MAX_POSITION}, got {first}..{last}")


@torch.library.custom_op("macpo::sample", mutates_args=())
def _sample(
    logits: Tensor, seed: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor,
    repetition_penalty: Tensor, seen: Tensor | None, request_keys: Tensor, positions: Tensor, penalised: bool,
    greedy: bool, any_greedy: bool, top_ks: list[int], any_top_p: bool, any_min_p: bool, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    facts = {
        "penalised": penalised,
        "greedy": greedy,
        "any_greedy": any_greedy,
        "top_ks": tuple(top_ks),
        "top_p": any_top_p,
        "min_p": any_min_p,
    }
    settings = (seed, temperature, top_p, top_k, min_p, repetition_penalty)
    params = SampleParams.of_checked(*settings, seen, facts)
    return run_sample(logits, params, request_keys, positions, backend)


@_sample.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    positions = args[8]
    raw, processed = (logits.new_empty(positions.shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(positions), raw, processed
