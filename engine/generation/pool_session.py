"""PoolSession: what generation over the block pool keeps between two runs: pool, rows' state and CUDA graphs.

A graph is a replay of `DecodeStep.step` at one bucket of rows. It reads weights, pool and state at the addresses that
they had when it was captured, so values may change (an optimiser's step, new adapter weights, another batch) but not
tensors: where one was allocated anew, or another adapter is active, the graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.generation.decode_step import DecodeStep, StepShape, facts_of
from macpo.engine.generation.kv_pool import KVPool
from macpo.engine.generation.model_facts import LayerShape
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.request import Request
from macpo.engine.generation.scheduler import Need
from macpo.kernels import explain
from macpo.kernels.paged_attention.op import why_not

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Rows of a decode step; a batch is padded to the next one."""
BEYOND = 128
"""Above the last bucket every multiple of this is one."""


def bucket_of(num_rows: int) -> int:
    """Rows of the step that serves so many sequences: a function of their number alone."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), -(-num_rows // BEYOND) * BEYOND)


def buckets_up_to(num_rows: int) -> list[int]:
    """All buckets that batches of at most so many sequences use."""
    return sorted({bucket_of(n) for n in range(1, num_rows + 1)})


@dataclass(frozen=True)
class PoolPlan:
    """What a run takes: a function of its requests and of the generator's bounds alone."""

    num_slots: int
    num_blocks: int
    needs: Mapping[tuple[int, int], Need]
    shape: StepShape


def plan_pool(
    requests: Sequence[Request],
    budget: Callable[[Request], int],
    *,
    num_stop_ids: int,
    num_tokens: int,
    block_tokens: int,
    max_batch: int,
    max_cache_tokens: int | None,
) -> PoolPlan:
    """Sequences and blocks at once; `budget` gives a request's most new tokens.

    Without `max_cache_tokens` the pool holds the longest `max_batch` answers; with it, what fits.
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
        num_tokens=num_tokens,
        facts=facts_of(list({r.params: None for r in requests})),
    )
    return PoolPlan(num_slots, num_blocks, needs, shape)


def _power_of_two(n: int) -> int:
    """The next one: few shapes, so that sessions are kept."""
    return 1 << max(0, n - 1).bit_length()


def pool_why_not(layers: Mapping[int, LayerShape], block_tokens: int, device: torch.device) -> str:
    """Why a model's keys and values cannot lie in a block pool; empty where they can."""
    for shape in set(layers.values()):
        if shape.k_dim != shape.v_dim:
            return f"keys of {shape.k_dim} and values of {shape.v_dim} numbers a head"
        if reason := why_not(device, shape.dtype, shape.k_dim, block_tokens):
            return reason
    return ""


def graphs_why_not(model: PreTrainedModel, team: World = ALONE) -> str:
    """Why decoding of the model cannot be captured, as far as that is known beforehand; empty where it may be."""
    if model.device.type != "cuda":
        return f"the model is on a {model.device.type.upper()}, not on a GPU"
    if team.size > 1:
        return "its layers are split over ranks, and what they say to each other is not captured"
    for op in ("paged_attention", "sample"):
        if (choice := explain(op, model.device)).backend != "triton":
            return f"{op} runs with {choice.backend}: {choice.why}"
    return waiting_part(model)


def waiting_part(model: PreTrainedModel) -> str:
    """The part of a forward that waits for the device in every step; empty where none is known."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                return f"its {kind} rotary embedding looks at the positions on the host"
    return ""


class PoolSession:
    """Pool and state for up to `num_rows` rows and `num_blocks` blocks, and the graphs captured so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[int, LayerShape],
        block_tokens: int,
        num_rows: int,
        num_blocks: int,
        shape: StepShape,
        team: World = ALONE,
    ) -> None:
        self.pool = KVPool(num_blocks, block_tokens, layers, model.device)
        self.step = DecodeStep(model, self.pool, num_rows, shape, team)
        self._layers = dict(layers)
        self._device = model.device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None
        self._captured: tuple[object, ...] = ()

    def serves(self, plan: PoolPlan, layers: Mapping[int, LayerShape]) -> bool:
        """Whether a run of this plan can use the session as it is."""
        return (
            self._layers == layers
            and self._device == self.step.model.device
            and self.step.shape == plan.shape
            and self.step.num_rows >= bucket_of(plan.num_slots)
            and self.pool.num_blocks >= plan.num_blocks
        )

    def start(self, adapters: StackedAdapters | None) -> None:
        """Forgets the rows of the last run, which may have been broken off."""
        self.step.clear()
        if adapters is not self.step.adapters:
            self.step.adapters = adapters
            self.drop_graphs()

    def run_step(self, bucket: int) -> None:
        """One decode step, as a replay where its graph is there."""
        graph = self._graphs.get(bucket)
        if graph is None:
            self.step.step(bucket)
        else:
            graph.replay()

    def capture(self, num_slots: int, outer: nn.Module) -> None:
        """Captures the graphs that batches of up to `num_slots` sequences lack; the model's hook is on.

        Raises:
            RuntimeError: something in the model's forward waits for the device. There are no graphs then.
        """
        present = _addresses(outer)
        if present != self._captured:
            self.drop_graphs()
            self._captured = present
        missing = [bucket for bucket in buckets_up_to(num_slots) if bucket not in self._graphs]
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        try:
            for bucket in reversed(missing):  # the largest first: the others fit into its memory
                self._graphs[bucket] = _capture(self.step, bucket, self._memory)
        except RuntimeError:
            self.drop_graphs()
            raise
        finally:
            self.step.clear()

    def drop_graphs(self) -> None:
        """Steps run eagerly from now on."""
        self._graphs.clear()
        self._memory = None
        self._captured = ()


def _capture(step: DecodeStep, bucket: int, memory: Any) -> torch.cuda.CUDAGraph:
    """All rows idle meanwhile: nothing is written but the log."""
    with torch.cuda.device(step.model.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.step(bucket)  # compiles kernels and makes workspaces
            with _waiting_is_an_error():
                step.step(bucket)
        torch.cuda.current_stream().wait_stream(stream)
        step.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            step.step(bucket)
    return graph


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """A call that waits for the device raises RuntimeError, which is milder than inside a capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _addresses(model: nn.Module) -> tuple[object, ...]:
    """Where the weights are, and which adapters the layers are set to: what a graph has fixed."""
    tensors = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    settings = tuple(
        (
            tuple(tuner.active_adapters),
            tuple(tuner.merged_adapters),
            tuner.disable_adapters,
            repr(getattr(tuner, "scaling", None)),
        )
        for tuner in tuners
    )
    return tensors, settings
