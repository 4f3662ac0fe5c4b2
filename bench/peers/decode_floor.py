"""The least time that answering some requests can take on a device, from what is measured on it in the same run.

At most `max_batch` sequences run together; the requests of the longest answers start first, and the next one starts as
soon as one ends, which wastes nearly no row. A step of n sequences costs the products of all linear layers with n rows
(measured in a CUDA graph on a GPU, over packed weights on a CPU; reading the weights is part of that, and they count at
the copy's speed where that is slower), and reading every running sequence's keys and values at the copy's speed. The
prompts cost the products of the linear layers without the head.
Attention's own products, norms, sampling and launches count as nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from bench.harness.device import copy
from bench.harness.timing import Outputs, Run, calls_for, in_graph, stretch
from bench.inputs.requests import GenerationRequest
from macpo.engine.generation.pool.capacity import bucket_of
from macpo.engine.generation.slots.packed_linear import packed_dtypes, packed_product

COPY_BYTES = {"cpu": 2**25, "cuda": 2**30}
PREFILL_ROWS = 2048
REPEATS = 5


@dataclass(frozen=True)
class Floor:
    """Seconds of the parts, and the copy's speed."""

    products_s: float
    keys_values_s: float
    prompts_s: float
    bytes_per_s: float

    @property
    def total_ms(self) -> float:
        return (self.products_s + self.keys_values_s + self.prompts_s) * 1e3

    def __str__(self) -> str:
        return (
            f"floor {self.total_ms:.3g} ms: weights and products of the steps {self.products_s * 1e3:.3g}, keys and "
            f"values {self.keys_values_s * 1e3:.3g} at {self.bytes_per_s / 1e9:.3g} GB/s, "
            f"prompts {self.prompts_s * 1e3:.3g}"
        )


@torch.no_grad()
def decode_floor(model: PreTrainedModel, requests: Sequence[GenerationRequest], max_batch: int) -> Floor:
    """Compute the floor of greedy responses of exactly the lengths that the requests ask for."""
    device = model.device
    num_bytes = COPY_BYTES[device.type]
    bytes_per_s = num_bytes / seconds_of(copy(num_bytes, device), device)
    head = model.get_output_embeddings().weight
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    read_s = sum(weight.nbytes for weight in weights) / bytes_per_s
    steps = steps_of(requests, max_batch)
    buckets = {bucket_of(len(contexts)) for contexts in steps}
    step_s = {n: max(read_s, seconds_of(_products(weights, n), device)) for n in buckets}
    body = [weight for weight in weights if weight is not head]
    rows = min(PREFILL_ROWS, sum(len(r.prompt_ids) for r in requests))
    prompt_s = seconds_of(_products(body, rows), device) / rows
    return Floor(
        sum(step_s[bucket_of(len(contexts))] for contexts in steps),
        sum(map(sum, steps)) * kv_bytes(model) / bytes_per_s,
        prompt_s * sum(len(r.prompt_ids) for r in requests),
        bytes_per_s,
    )


def steps_of(requests: Sequence[GenerationRequest], max_batch: int) -> list[list[int]]:
    """Return each step's context lengths, one per sequence that runs in it.

    A response's first token comes from the prompt's forward; the others take a step each.
    """
    waiting = deque(sorted((r for r in requests if r.new_tokens > 1), key=lambda r: -r.new_tokens))
    running: list[tuple[GenerationRequest, int]] = []
    steps = []
    while waiting or running:
        running += [(waiting.popleft(), 1) for _ in range(min(len(waiting), max_batch - len(running)))]
        steps.append([len(r.prompt_ids) + done for r, done in running])
        running = [(r, done + 1) for r, done in running if done + 1 < r.new_tokens]
    return steps


def kv_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers * config.num_key_value_heads * head) * model.dtype.itemsize


def _products(weights: Sequence[torch.Tensor], rows: int) -> Run:
    """Return a call of x W' for every weight, with `rows` rows of x each."""
    widths = {weight.shape[1] for weight in weights}
    x = {n: torch.randn(rows, n, dtype=weights[0].dtype, device=weights[0].device) for n in widths}
    if weights[0].device.type == "cpu" and weights[0].dtype in packed_dtypes():
        products = [partial(packed_product(weight, None)[0], x[weight.shape[1]]) for weight in weights]
    else:
        products = [partial(torch.mm, x[weight.shape[1]], weight.T) for weight in weights]

    def run() -> Outputs:
        for one in products:
            one()
        return {}

    return run


def seconds_of(run: Run, device: torch.device) -> float:
    """Return the best of a few timed stretches, in seconds per call."""
    run()
    if device.type == "cuda":
        run, _ = in_graph(run)
    num_calls = calls_for(run, device, 0.0)
    return min(stretch(run, num_calls, device) for _ in range(REPEATS))
