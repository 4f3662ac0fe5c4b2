"""Predicts the seconds of a training step: a roofline per operator, the head, the optimizer, and communication.

Every operator of the `dry_run` takes the longer of its FLOP at the machine's rate and its bytes at the machine's
bandwidth. A GPU works while the host launches, so the longer of the two counts; a CPU does both in turn.
`calibrated` scales a machine by one measured step. Without it the rates are the shares of the makers' peaks that
well-shaped products reach, not measurements of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from macpo.engine.hardware import Gpu
from macpo.engine.models.flops import Counts, ModelShape, counts_of_lengths, head_is_target
from macpo.engine.planning.dry_run import Operator
from macpo.engine.planning.memory import NF4_BYTES, NF4_SCALES, Row, Setup, row_run, tensor_config

PRODUCTS_REACH = 0.75
"""Share of a GPU's peak that cuBLAS bfloat16 products of thousands of rows reach (H100: about 740 of 989 TFLOP/s)."""
COPIES_REACH = 0.80
"""Share of a GPU's bandwidth that operators reach which only move memory."""
ATTENTION_REACHES = 0.40
"""Share of a GPU's peak that the shared-prefix kernels reach, whose tiles are partly masked."""
NETWORK_REACHES = 0.80
OVERLAP = 0.85
"""Share of the computing time behind which FSDP2 can hide communication."""
LAUNCH_S = 6e-6
"""Host seconds per operator: Python, autograd and CUDA's launch together."""
HOST_BYTES_PER_S = 50e9
"""Bandwidth of pinned host memory over PCIe 5, each way."""
ADAMW_BYTES = 32
"""Bytes moved per trained weight: AdamW reads four float32 numbers and writes three; the norm reads one."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The speed of one rank's device, host and network."""

    name: str
    flops: Mapping[torch.dtype, float]
    """Reached FLOP/s of products, by dtype."""
    attention: float
    """Reached FLOP/s of attention."""
    bandwidth: float
    """Reached bytes/s of device memory."""
    launch: float
    """Host seconds per operator."""
    waits: bool
    """Whether computation waits for the host, as on a CPU."""
    logit_passes: float
    """Passes over the float32 logits between the head's products; exponentials count too."""
    near: float = 0.0
    """Bytes/s to ranks of the same node."""
    far: float = 0.0
    """Bytes/s to other nodes."""
    scale: float = 1.0
    """Measured seconds of the calibration step divided by predicted ones."""

    @classmethod
    def of_gpu(cls, gpu: Gpu) -> Machine:
        rates = {
            torch.bfloat16: gpu.bf16_flops * PRODUCTS_REACH,
            torch.float16: gpu.bf16_flops * PRODUCTS_REACH,
            torch.float32: gpu.float32_flops * PRODUCTS_REACH,
        }
        near, far = gpu.nvlink_bytes_per_s * NETWORK_REACHES, gpu.network_bytes_per_s * NETWORK_REACHES
        attention = gpu.bf16_flops * ATTENTION_REACHES
        return cls(gpu.name, rates, attention, gpu.bandwidth_bytes_per_s * COPIES_REACH, LAUNCH_S, False, 3, near, far)

    @classmethod
    def of_cpu(cls, threads: int) -> Machine:
        """A CPU of ordinary speed; `calibrated` adapts it to this machine."""
        rates = {torch.float32: 9e10 * threads, torch.bfloat16: 9e10 * threads, torch.float64: 4.5e10 * threads}
        return cls("CPU", rates, 3.3e10 * threads, 9e9 * threads, 1.5e-5, True, 8)

    def calibrated(self, measured: float, predicted: float) -> Machine:
        """The machine on which the predicted step takes the measured seconds."""
        return replace(self, scale=self.scale * measured / predicted)

    def run(self, operators: Sequence[Operator]) -> float:
        """Seconds of operators that run one after another."""
        device = 0.0
        for operator in operators:
            rate = self.flops.get(operator.dtype, self.flops[torch.float32])
            device += max(operator.flops / rate, operator.moved / self.bandwidth)
        host = self.launch * len(operators)
        return device + host if self.waits else max(device, host)

    def product(self, flops: float, dtype: torch.dtype) -> float:
        return flops / self.flops.get(dtype, self.flops[torch.float32])


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one rank's optimiser step, by part."""

    blocks: float
    attention: float
    head: float
    recomputed: float
    optimizer: float
    exposed: float
    """Communication and host copies that computation does not hide."""

    @property
    def total(self) -> float:
        return self.blocks + self.attention + self.head + self.recomputed + self.optimizer + self.exposed


def step_time(config: PretrainedConfig, setup: Setup, machine: Machine, rows: Sequence[Row]) -> StepTime:
    """Predict the step of a rank that trains on these packed rows, without computing reference log-probs.

    Raises:
        ConfigError: transformers does not know the model, or tensor parallelism cannot split it.
    """
    local = tensor_config(config, setup.parallel.tensor)
    shape, whole = ModelShape.of(local), ModelShape.of(config)
    parts = [_row_time(local, shape, setup, machine, row) for row in rows]
    blocks, attention, head, recomputed, exposed = (sum(column) for column in zip(*parts, strict=True))
    trained = _trained(shape, whole, setup)
    optimizer = ADAMW_BYTES * trained / setup.shards / machine.bandwidth
    exposed += _reduction(trained, setup, machine)
    scale = machine.scale
    return StepTime(blocks * scale, attention * scale, head * scale, recomputed * scale, optimizer * scale, exposed)


def _row_time(
    local: PretrainedConfig, shape: ModelShape, setup: Setup, machine: Machine, row: Row
) -> tuple[float, float, float, float, float]:
    """Seconds (blocks, attention, head, recomputed, exposed) of one micro-batch."""
    counts = counts_of_lengths(row, shape.windows)
    run, layers = row_run(local, setup, row), len(shape.layers)
    forward = layers * machine.run(run.block.forward)
    blocks = forward + layers * machine.run(run.block.backward)
    blocks += machine.run(run.ends.forward) + machine.run(run.ends.backward)
    if setup.four_bits:
        packed = sum(m.numel for layer in shape.layers for m in layer.matrices if m.linear)
        blocks += 2 * packed * (NF4_BYTES + NF4_SCALES + setup.dtype.itemsize) / machine.bandwidth
    pairs = sum(counts.attended_in(layer.window) for layer in shape.layers)
    one_pass = 2.0 * shape.heads * (shape.qk_dim + shape.v_dim) * pairs / machine.attention
    attention = 3.5 * one_pass
    recomputed = 0.0
    if setup.parallel.checkpointing == "full":
        recomputed = forward + one_pass
    elif setup.parallel.checkpointing == "selective":
        recomputed = layers * machine.run([o for o in run.block.forward if not o.product]) + one_pass
    waiting = _waiting(shape, setup, machine, counts, blocks + attention + recomputed, run.block.saved)
    return blocks, attention, _head(shape, counts, setup, machine), recomputed, waiting


def _head(shape: ModelShape, counts: Counts, setup: Setup, machine: Machine) -> float:
    """Seconds of the loss over N rows [N, H]; with tensor parallelism, for a rank's part of the vocabulary."""
    trained = setup.full or head_is_target(setup.targets)
    vocab = -(-shape.vocab // setup.parallel.tensor)
    products = (3 if trained else 2) * 2.0 * counts.rows * shape.hidden * vocab
    logits = machine.logit_passes * 4.0 * counts.rows * vocab
    return machine.product(products, setup.dtype) + logits / machine.bandwidth


def _trained(shape: ModelShape, whole: ModelShape, setup: Setup) -> float:
    if setup.full:
        return whole.num_parameters / setup.parallel.tensor
    return float(shape.adapter_parameters(setup.rank, setup.targets))


def _waiting(
    shape: ModelShape, setup: Setup, machine: Machine, counts: Counts, compute: float, block_saved: int
) -> float:
    """Exposed seconds per micro-batch: weights gathered twice, tensor-parallel sums, activations offloaded and back."""
    if machine.waits:
        return 0.0
    itemsize, tensor = setup.dtype.itemsize, setup.parallel.tensor
    hidden = 0.0  # what computing can hide
    if setup.shards > 1:
        weights = shape.num_parameters * itemsize * (setup.shards - 1) / setup.shards
        hidden += 2 * weights / _speed(setup.shards * tensor, setup, machine)
    if setup.parallel.offload_activations:
        hidden += 2 * len(shape.layers) * block_saved / HOST_BYTES_PER_S
    shown = max(0.0, hidden - OVERLAP * compute)
    if tensor > 1:
        passes = 6 if setup.parallel.checkpointing == "full" else 4
        sums = passes * len(shape.layers) * counts.tokens * shape.hidden * itemsize
        sums += counts.rows * (4 * shape.hidden + 20)  # dX of the head; a maximum and two float64 sums a row
        shown += 2 * sums * (tensor - 1) / tensor / _speed(tensor, setup, machine)
    return shown


def _reduction(trained: float, setup: Setup, machine: Machine) -> float:
    """Exposed seconds per step: float32 gradients are reduced to the shards, or to every copy."""
    if machine.waits:
        return 0.0
    out, tensor, shards = 0.0, setup.parallel.tensor, setup.shards
    if shards > 1:
        out += (1 - OVERLAP) * 4 * trained * (shards - 1) / shards / _speed(shards * tensor, setup, machine)
    copies = setup.data_ranks // shards
    if copies > 1:
        out += 2 * 4 * trained / shards * (copies - 1) / copies / _speed(setup.ranks, setup, machine)
    return out


def _speed(ranks: int, setup: Setup, machine: Machine) -> float:
    """Bytes/s of a ring over neighbouring ranks; every rank has its own link to the next node."""
    return machine.near if ranks <= setup.ranks_per_node else machine.far
