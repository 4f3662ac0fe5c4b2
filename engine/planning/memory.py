"""Predicts the memory of one rank in training, by content and by phase, before anything is loaded.

States (weights, gradients, AdamW's moments, adapters) follow from the shape and the sharding; saved activations and
temporary memory of a block come from a `dry_run` of the real modules; the head's buffers from its chunk size. The peak
is that of the worst phase. All figures are bytes of tensors; `DEVICE_BYTES` and `FRAGMENTATION` are what a GPU needs on
top, `PROCESS_BYTES` and `HEAP` what a process on a CPU does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings
from macpo.engine.errors import ConfigError
from macpo.engine.models.flops import ModelShape, counts_of_lengths, head_is_target, is_target
from macpo.engine.models.policy import KEPT_GRADIENT_BYTES
from macpo.engine.planning.dry_run import AttentionCost, DryRun, Recorder, dry_run
from macpo.kernels import Segments, prefix_attention
from macpo.kernels.linear_logp.head import default_chunk_rows

DEVICE_BYTES = 1.2e9
"""CUDA context, cuBLAS workspaces and NCCL's channels of a process, which no tensor holds."""
FRAGMENTATION = 0.04
"""Share of the peak that torch's allocator holds in blocks too small to be used."""
PROCESS_BYTES = 0.5e9
"""Torch, transformers and peft in a process, before there is a model."""
HEAP = 2.0
"""What glibc's heap takes for tensors that come and go, by their own size: SmolLM2-135M's steps with 256 to 2,048
tokens a forward took 1.7 to 2.5 of it (bench/bench_plan.py)."""
NF4_BYTES = 0.5
"""Bytes of a weight in 4 bits."""
NF4_SCALES = 1 / 64 + 4 / (64 * 256)
"""Bytes of scales per weight: an 8-bit scale for 64 weights and a float32 one for 256 of these (QLoRA, arXiv
2305.14314, section 3). Scales are not parameters, so no rank shards them."""
GATHERED_BLOCKS = 3
"""Blocks whose whole weights FSDP2 holds at once: the current one, the next, and the buffer for incoming weights."""

WHOLE = ParallelSettings()
Row = Sequence[tuple[int, Sequence[int]]]
"""The groups of a packed row: (prompt tokens, [tokens of each response])."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is trained: everything except the model and the data."""

    tuning: LoraSettings | FullSettings
    parallel: ParallelSettings = WHOLE
    dtype: torch.dtype = torch.bfloat16
    """Dtype of frozen weights and of the computation."""
    device: Literal["cpu", "cuda"] = "cuda"
    ranks: int = 1
    ranks_per_node: int = 8

    @property
    def data_ranks(self) -> int:
        """Ranks that hold different groups."""
        return self.ranks // self.parallel.tensor

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights is sharded, apart from tensor parallelism."""
        if self.parallel.sharding == "shard":
            return self.data_ranks
        if self.parallel.sharding == "hybrid":
            return max(1, min(self.ranks, self.ranks_per_node) // self.parallel.tensor)
        return 1

    @property
    def full(self) -> bool:
        return isinstance(self.tuning, FullSettings)

    @property
    def four_bits(self) -> bool:
        """Whether the frozen base is in 4 bits."""
        return isinstance(self.tuning, LoraSettings) and self.tuning.quantization == "nf4"

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 gathers or casts a block's weights when it runs: from shards, or from float32 to 16 bits."""
        return self.shards > 1 or (self.full and self.dtype != torch.float32)

    @property
    def fused_lora(self) -> bool:
        """Whether adapters run through `lora_linear`, which needs whole layers that are not in 4 bits."""
        return not self.full and not self.four_bits and self.parallel.tensor == 1

    @property
    def rank(self) -> int:
        """The adapter's rank; 0 with full tuning."""
        return self.tuning.rank if isinstance(self.tuning, LoraSettings) else 0

    @property
    def targets(self) -> tuple[str, ...] | Literal["all-linear"]:
        return self.tuning.target_modules if isinstance(self.tuning, LoraSettings) else ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    saved: float
    """Activations from the forward to the backward."""
    head: float
    """Buffers of the loss: the hidden states it reads, their gradient, a chunk of logits, dW of a trained head."""
    scratch: float
    """Peak temporary memory of a block; with checkpointing it includes recomputed activations."""
    gathered: float
    """Weights of blocks, embedding and head that FSDP2 holds whole, and gradients that await reduction."""
    host: float
    """Activations offloaded to host memory."""
    phases: tuple[tuple[str, float], ...]
    on_gpu: bool = True
    pooled: float = 0.0
    """The cached base model, which stays loaded beside the float32 copy that trains, in every phase."""

    @property
    def peak(self) -> float:
        return max(size for _, size in self.phases)

    @property
    def device(self) -> float:
        """Memory of the process: the peak and what torch and the driver, or the process and its heap, need on top."""
        if self.on_gpu:
            return self.peak * (1 + FRAGMENTATION) + DEVICE_BYTES
        kept = self.weights + self.optimizer + self.pooled
        return PROCESS_BYTES + kept + HEAP * (self.peak - kept)


def memory(config: PretrainedConfig, setup: Setup, row: Row, num_rows: int = 1) -> Memory:
    """Memory of a rank that trains `config`'s model on `num_rows` packed rows per step, the largest of which is `row`.

    Raises:
        ConfigError: transformers does not know the model, or tensor parallelism cannot split it.
    """
    local = tensor_config(config, setup.parallel.tensor)
    shape, counts = ModelShape.of(local), counts_of_lengths(row)
    run = row_run(local, setup, row)
    itemsize = setup.dtype.itemsize
    states = _states(shape, ModelShape.of(config), setup)
    saved, recomputed, host = _activations(shape, run, setup)
    head, head_kept = head_bytes(shape, counts.rows, setup)
    gathered, reduced = _gathered(shape, setup)
    scratch = recomputed + run.backward_scratch
    if setup.four_bits:  # one weight at a time is unpacked
        scratch += max((m.numel for layer in shape.layers for m in layer.matrices if m.linear), default=0) * itemsize
    kept_gradients = states.gradients
    if setup.gathers and num_rows > 1 and 4 * states.trained <= KEPT_GRADIENT_BYTES:
        kept_gradients = max(kept_gradients, 4.0 * states.trained)
    before = kept_gradients if num_rows > 1 else 0.0
    spread = setup.ranks > 1 and (setup.parallel.sharding != "replicate" or setup.parallel.tensor > 1)
    pooled = float(shape.num_parameters * itemsize) if setup.full and not spread else 0.0
    always = states.weights + states.optimizer + pooled
    first_block = saved + scratch + gathered + reduced
    one_block = run.ends.saved + (run.block_input + recomputed if recomputed else run.block.saved)
    through_head = 2 * counts.rows * shape.hidden * itemsize + 2 * run.block_input
    if setup.parallel.tensor > 1:  # dX on its way between the ranks
        through_head += 4 * counts.rows * shape.hidden
    flat = 4.0 * states.trained if setup.ranks > 1 and not setup.gathers else 0.0
    phases = (
        ("forward", always + before + gathered + saved + max(run.forward_scratch + recomputed, head)),
        ("head backward", always + max(before, head_kept) + gathered + saved + through_head),
        ("backward", always + max(before, head_kept) + first_block),
        ("last backward", always + kept_gradients + one_block + run.backward_scratch + gathered + reduced),
        ("optimizer", always + kept_gradients + flat),
    )
    return Memory(
        weights=states.weights,
        gradients=kept_gradients,
        optimizer=states.optimizer,
        saved=saved,
        head=head,
        scratch=scratch,
        gathered=gathered + reduced,
        host=host,
        phases=phases,
        on_gpu=setup.device == "cuda",
        pooled=pooled,
    )


def checkpoint_bytes(config: PretrainedConfig, setup: Setup) -> float:
    """Bytes of a training checkpoint over all ranks: trained float32 weights and their two moments."""
    return 12.0 * _states(ModelShape.of(config), ModelShape.of(config), replace(setup, ranks=1, parallel=WHOLE)).trained


@dataclass(frozen=True, slots=True)
class _States:
    weights: float
    gradients: float
    optimizer: float
    trained: float
    """Number of trained weights of one tensor-parallel rank, over all shards."""


def _states(shape: ModelShape, whole: ModelShape, setup: Setup) -> _States:
    """States of a rank; `whole` is the model before tensor parallelism splits embedding and head by vocabulary."""
    tensor, itemsize = setup.parallel.tensor, setup.dtype.itemsize
    head = 0 if whole.tied else whole.vocab * whole.hidden + whole.vocab * whole.head_bias
    outside = (whole.others + head) / tensor
    blocks = sum(layer.num_parameters for layer in shape.layers)
    if isinstance(setup.tuning, LoraSettings):
        trained = float(shape.adapter_parameters(setup.rank, setup.targets))
        packed = 0.0
        if setup.four_bits:
            packed = float(sum(m.numel for layer in shape.layers for m in layer.matrices if m.linear))
        frozen = (blocks - packed + outside) * itemsize + packed * NF4_BYTES
        weights = (frozen + 4 * trained) / setup.shards + packed * NF4_SCALES
    else:
        trained = blocks + outside
        weights = 4 * trained / setup.shards
    return _States(weights, 4 * trained / setup.shards, 8 * trained / setup.shards, trained)


def _activations(shape: ModelShape, run: DryRun, setup: Setup) -> tuple[float, float, float]:
    """(saved, recomputed at a time, offloaded to the host) bytes of activations."""
    layers, block = len(shape.layers), run.block
    kind = setup.parallel.checkpointing
    recomputed = 0.0
    if kind == "off":
        each = float(block.saved)
    else:
        each = float(run.block_input)
        if kind == "selective":
            each += block.kept
        recomputed = max(0.0, block.saved - (each - run.block_input if kind == "selective" else 0.0))
    host = 0.0
    if setup.parallel.offload_activations:
        # the current block is on the device; on a CPU the copies stay in the same memory
        host = each * layers
        recomputed = block.saved if kind == "off" else recomputed + each
        each = 0.0 if setup.device == "cuda" else each
    return (run.ends.saved if kind == "off" else run.outside) + layers * each, recomputed, host


def _gathered(shape: ModelShape, setup: Setup) -> tuple[float, float]:
    """Bytes of (gathered weights, gradients between a block's backward and their reduction)."""
    if not setup.gathers:
        return 0.0, 0.0
    itemsize = setup.dtype.itemsize
    head = 0 if shape.tied else shape.vocab * shape.hidden
    layer = max(shape.layers, key=lambda layer: layer.num_parameters)
    block = float(layer.num_parameters * itemsize)
    trained = layer.num_parameters
    if isinstance(setup.tuning, LoraSettings):
        if setup.four_bits:
            block = float(sum(m.numel * (NF4_BYTES if m.linear else itemsize) for m in layer.matrices))
        trained = sum(setup.rank * (m.inputs + m.outputs) for m in layer.matrices if is_target(m, setup.targets))
        block += 4 * trained
    outside = (shape.others + head) * itemsize / setup.parallel.tensor  # split by vocabulary
    reduced = trained * (itemsize + 4.0)
    return outside + GATHERED_BLOCKS * block, reduced


def head_bytes(shape: ModelShape, num_rows: int, setup: Setup, *, chunk_rows: int | None = None) -> tuple[float, float]:
    """(peak bytes, bytes kept as the weight's gradient) of `pair_loss` over N rows [N, H].

    With tensor parallelism, those of the rank with the largest part of the vocabulary.
    """
    itemsize, vocab = setup.dtype.itemsize, -(-shape.vocab // setup.parallel.tensor)
    wide = max(4, itemsize)
    chunk = min(num_rows, chunk_rows or default_chunk_rows(vocab, setup.device))
    rows = 2.0 * num_rows * shape.hidden * itemsize  # what the loss reads, and its gradient
    logits = float(chunk * vocab * wide)
    if setup.dtype != torch.float32 and setup.device == "cpu":
        logits += chunk * vocab * itemsize  # d in 16 bits lies beside the logits there
    if not (setup.full or head_is_target(setup.targets)):
        return rows + logits, 0.0
    weight = float(vocab * shape.hidden)
    rounded = 0 if itemsize == 4 else weight * itemsize
    added = logits + weight * wide + chunk * shape.hidden * itemsize  # each chunk's g h is rounded and added to dW
    return rows + max(added, weight * wide + rounded), weight * itemsize


def tensor_config(config: PretrainedConfig, ranks: int) -> PretrainedConfig:
    """The config of one tensor-parallel rank's blocks: its attention heads and its part of the MLP's width.

    Raises:
        ConfigError: the ranks do not divide the sizes, or the model has no plan for tensor parallelism.
    """
    text = config.get_text_config()
    if ranks == 1:
        return text
    local: Any = copy.deepcopy(text)
    if getattr(text, "is_heterogeneous", False):
        raise ConfigError(f"{text.model_type} has layers of different sizes, which are not split", "set tensor to 1")
    if not getattr(text, "base_model_tp_plan", None) or not hasattr(text, "num_key_value_heads"):
        raise ConfigError(f"{text.model_type} has no plan for tensor parallelism", "set tensor to 1")
    local.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(text, name)
        if count % ranks:
            raise ConfigError(f"{name} is {count}, which {ranks} ranks do not divide", "use fewer ranks")
        setattr(local, name, count // ranks)
    assert isinstance(local, PretrainedConfig)
    return local


def row_run(config: PretrainedConfig, setup: Setup, row: Row) -> DryRun:
    """The dry run of a packed row with the device's attention; cached, because many setups share it."""
    quantized = isinstance(setup.tuning, LoraSettings) and setup.tuning.quantization != "none"
    tuning = setup.tuning.model_copy(update={"quantization": "none"}) if quantized else setup.tuning
    keyed = _Keyed(config.to_json_string(use_diff=False), config)
    lengths = tuple((prompt, tuple(responses)) for prompt, responses in row)
    return _row_run(keyed, setup.dtype, tuning, setup.fused_lora, setup.device, lengths)


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A config as a cache key: configs of the same JSON are equal."""

    json: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=64)
def _row_run(
    keyed: _Keyed,
    dtype: torch.dtype,
    tuning: LoraSettings | FullSettings,
    fused_lora: bool,
    device: str,
    row: tuple[tuple[int, tuple[int, ...]], ...],
) -> DryRun:
    config, counts = keyed.config, counts_of_lengths(row)
    attention = attention_cost(ModelShape.of(config), row, dtype, device)
    ways: dict[str, Any] = {"tuning": tuning, "fused_lora": fused_lora}
    return dry_run(config, counts.tokens, counts.rows, dtype=dtype, attention=attention, **ways)


def attention_cost(shape: ModelShape, row: Row, dtype: torch.dtype, device: str) -> AttentionCost:
    """Memory of `prefix_attention` for one layer.

    On a GPU the Triton kernels keep q, k, v, o and one float32 number per token and head. On a CPU the operator is run
    once with the row's own segments, because its padding and copies depend on the lengths.
    """
    tokens, heads = counts_of_lengths(row).tokens, shape.heads
    if device == "cuda":
        return AttentionCost(saved=4 * heads * tokens, backward=4 * heads * tokens)
    segments = Segments.from_lengths(row)
    sizes = (heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.zeros(tokens, n, shape.qk_dim, dtype=dtype, requires_grad=True) for n in sizes)
    prefix_attention(q, k, v, segments)  # creates the masks, which all layers share
    inputs = (q, k, v)
    kept: set[int] = set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.add(x.untyped_storage()._cdata)
        return x

    with Recorder(inputs) as recorder, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = prefix_attention(q, k, v, segments)
        keeps_output = out.untyped_storage()._cdata in kept
        alive, forward = recorder.live, recorder.peak - recorder.live
        upstream = torch.zeros_like(out)
        recorder.peak = before = recorder.live
        out.backward(upstream)
        results = sum(x.numel() * x.element_size() for x in inputs)
        backward = max(0, recorder.peak - before - results)
    saved = alive - out.numel() * out.element_size()
    keeps_q, keeps_k, keeps_v = (x.untyped_storage()._cdata in kept for x in inputs)
    return AttentionCost(saved, (keeps_q, keeps_k, keeps_v), keeps_output, forward, backward)
