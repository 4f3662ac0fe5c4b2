"""Plans the block pool of a run and the sizes of its decode steps; says why a model or device cannot use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.pool.decode_step import StepShape, facts_of
from macpo.engine.generation.request import Request
from macpo.engine.generation.scheduler import Need
from macpo.engine.generation.vocabulary import Vocabulary
from macpo.kernels import explain
from macpo.kernels.paged_attention.op import why_not

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows of a decode step; a batch is padded to the next one."""
BEYOND = 128
"""Above the last bucket, every multiple of this number is one."""


def bucket_of(num_rows: int) -> int:
    """Rows of the step that serves `num_rows` sequences: a function of their number alone."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), -(-num_rows // BEYOND) * BEYOND)


def buckets_up_to(num_rows: int) -> list[int]:
    """All buckets that batches of at most `num_rows` sequences use."""
    return sorted({bucket_of(n) for n in range(1, num_rows + 1)})


@dataclass(frozen=True)
class PoolPlan:
    """What a run needs: a function of its requests and of the generator's limits alone."""

    num_slots: int
    num_blocks: int
    needs: Mapping[tuple[int, int], Need]
    shape: StepShape


def plan_pool(
    requests: Sequence[Request],
    budget: Callable[[Request], int],
    *,
    num_stop_ids: int,
    vocabulary: Vocabulary,
    block_tokens: int,
    max_batch: int,
    max_cache_tokens: int | None,
) -> PoolPlan:
    """Plans how many sequences and blocks are in use at once; `budget` gives the most new tokens of a request.

    Without `max_cache_tokens` the pool holds the longest `max_batch` responses; with it, what fits.
    """
    sizes = {(len(r.prompt_ids), budget(r)) for r in requests}
    needs = {(prompt, new): Need.of(prompt, prompt + new, block_tokens) for prompt, new in sizes}
    each = sorted((needs[len(r.prompt_ids), budget(r)] for r in requests for _ in r.samples), key=lambda need: need.own)
    num_slots = min(max_batch, len(each))
    num_blocks = sum(sorted(need.blocks(1) for need in each)[-num_slots:])
    if max_cache_tokens is not None and max_cache_tokens // block_tokens < num_blocks:
        num_blocks = max_cache_tokens // block_tokens
        fitting = takewhile(lambda blocks: blocks <= num_blocks, accumulate(need.own for need in each))
        num_slots = min(num_slots, len(list(fitting)))
    shape = StepShape(
        table_blocks=_power_of_two(max(need.blocks(1) for need in needs.values())),
        stop_ids=_power_of_two(num_stop_ids),
        vocabulary=vocabulary,
        facts=facts_of(list({r.params: None for r in requests})),
    )
    return PoolPlan(num_slots, num_blocks, needs, shape)


def _power_of_two(n: int) -> int:
    """The next power of two: few shapes, so that sessions are reused."""
    return 1 << max(0, n - 1).bit_length()


def pool_why_not(layers: Mapping[int, CacheShape], block_tokens: int, device: torch.device) -> str:
    """Why a model's keys and values cannot lie in a block pool; empty where they can."""
    for shape in set(layers.values()):
        if shape.k_dim != shape.v_dim:
            return f"keys of {shape.k_dim} and values of {shape.v_dim} numbers a head"
        if reason := why_not(device, shape.dtype, shape.k_dim, block_tokens):
            return reason
    return ""


def graphs_why_not(model: PreTrainedModel, team: World = ALONE) -> str:
    """Why decoding cannot be captured, as far as that is known beforehand; empty where it may be."""
    if model.device.type != "cuda":
        return f"the model is on a {model.device.type.upper()}, not on a GPU"
    if team.size > 1:
        return "its layers are split over a tensor-parallel group, whose communication is not captured"
    for op in ("paged_attention", "sample"):
        if (choice := explain(op, model.device)).backend != "triton":
            return f"{op} runs with {choice.backend}: {choice.why}"
    return waiting_part(model)


def waiting_part(model: PreTrainedModel) -> str:
    """Says which part of a forward waits for the device in every step; empty where none is known."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                return f"its {kind} rotary embedding reads the positions on the host"
    return ""
