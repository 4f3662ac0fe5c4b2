"""PoolSession: what generation over the block pool keeps between runs (the pool, the rows' state and CUDA graphs).

A graph replays `DecodeStep.step` at one bucket of rows. It reads weights, pool and state at the addresses that they had
when it was captured, so values may change (an optimiser's step, new adapter weights, another batch) but not tensors:
where a tensor was allocated again, or another adapter is active, the graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.pool.blocks import KVPool
from macpo.engine.generation.pool.capacity import PoolPlan, bucket_of, buckets_up_to
from macpo.engine.generation.pool.decode_step import DecodeStep, StepShape


class PoolSession:
    """Pool and state for up to `num_rows` rows and `num_blocks` blocks, and the graphs captured so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[int, CacheShape],
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

    def serves(self, plan: PoolPlan, layers: Mapping[int, CacheShape]) -> bool:
        """Whether a run of this plan can use the session as it is."""
        return (
            self._layers == layers
            and self._device == self.step.model.device
            and self.step.shape == plan.shape
            and self.step.num_rows >= bucket_of(plan.num_slots)
            and self.pool.num_blocks >= plan.num_blocks
        )

    def start(self, adapters: StackedAdapters | None) -> None:
        """Clears the rows of the last run, which may have been interrupted."""
        self.step.clear()
        if adapters is not self.step.adapters:
            self.step.adapters = adapters
            self.drop_graphs()

    def run_step(self, bucket: int) -> None:
        """Runs one decode step, as a replay where its graph exists."""
        graph = self._graphs.get(bucket)
        if graph is None:
            self.step.step(bucket)
        else:
            graph.replay()

    def capture(self, num_slots: int, outer: nn.Module) -> None:
        """Captures the graphs that batches of up to `num_slots` sequences lack; the model's hook must be on.

        Raises:
            RuntimeError: something in the model's forward waits for the device; no graphs are kept then.
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
                self._graphs[bucket] = capture_graph(self.step, bucket, self._memory)
        except RuntimeError:
            self.drop_graphs()
            raise
        finally:
            self.step.clear()

    def drop_graphs(self) -> None:
        """Drops all graphs, so that steps run eagerly."""
        self._graphs.clear()
        self._memory = None
        self._captured = ()


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are captured: cuBLAS keeps a workspace for each that it has seen."""
    return torch.cuda.Stream(device)


def capture_graph(step: DecodeStep, bucket: int, memory: Any) -> torch.cuda.CUDAGraph:
    """Captures the step at one bucket of rows; all of them idle, so that it writes nothing but the log."""
    with torch.cuda.device(step.model.device):
        stream = capture_stream(step.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.step(bucket)  # compiles kernels and allocates workspaces
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
    """Makes a call that waits for the device raise RuntimeError, which is milder than failing inside a capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _addresses(model: nn.Module) -> tuple[object, ...]:
    """Addresses of the weights and the layers' active adapters, which a graph depends on."""
    tensors = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    settings = tuple(
        (tuple(t.active_adapters), tuple(t.merged_adapters), t.disable_adapters, repr(getattr(t, "scaling", None)))
        for t in tuners
    )
    return tensors, settings
