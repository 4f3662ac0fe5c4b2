"""Runs a training forward and backward on torch's meta device, recording every operator and tensor lifetime.

The real modules of transformers and peft run with tensors that have a shape but no memory. So the operators, the
tensors saved for the backward and the temporary memory are those of the architecture itself, not of a formula. Models
with one and two blocks are enough to extrapolate to any number. A stand-in for attention saves what the device's
operator saves; `memory.head_bytes` covers the head.

T tokens of the packed row, H hidden size, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.models.activations import PRODUCTS
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.flops import meta_model
from macpo.engine.models.tuning import lora
from macpo.engine.models.tuning.lora_linear import LORA_LINEAR, products, use_fused_lora
from macpo.kernels import AttentionForm

_aten = torch.ops.aten
_PRODUCTS = {operator.overloadpacket for operator in PRODUCTS} | {_aten.addmm_}
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.detach, _aten.new_empty_strided}


@dataclass(frozen=True, slots=True)
class Operator:
    """One call on the device."""

    flops: float
    moved: int
    """Bytes of its inputs and outputs."""
    product: bool
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Counts the bytes of living tensors and lists operators, on any device.

    Args:
        ignore: tensors whose memory is not counted, such as a model's weights.

    Attributes:
        live: bytes of storages allocated inside and not freed.
        peak: largest value of `live`.
        operators: every call that moves memory, in order.
        kept: bytes of the results of products, each storage counted once.
    """

    def __init__(self, ignore: Iterator[Tensor] | tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operators: list[Operator] = []
        self.kept = 0
        self._sizes: dict[int, int] = {}
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignore}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is LORA_LINEAR:  # record the operators inside it
            with self:
                return products(*args, **kwargs)
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        before = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self._hold(tensor)
        packet = func.overloadpacket
        if (fresh or func._schema.is_mutable) and packet not in _FREE and outputs:
            product = packet in _PRODUCTS
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
            moved = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
            self.operators.append(Operator(flops, moved, product, outputs[0].dtype))
            if product:
                self.kept += sum(x.numel() * x.element_size() for x in fresh)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._ignored:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Memory of the attention operator for one packed row, in bytes."""

    saved: int = 0
    """Bytes kept for the backward beside inputs and result."""
    keeps: tuple[bool, bool, bool] = (True, True, True)
    """Whether q, k and v themselves are kept."""
    keeps_output: bool = True
    forward: int = 0
    """Temporary bytes of the forward."""
    backward: int = 0
    """Temporary bytes of the backward."""


@dataclass(slots=True)
class _StandIn:
    """An `AttentionContext` that allocates what an `AttentionCost` says."""

    cost: AttentionCost

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out: Tensor = _Attend.apply(q, k, v, self.cost)
        return out[None]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cost: AttentionCost) -> Tensor:
        scratch = _bytes(q, cost.forward)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        del scratch
        extra = [_bytes(q, cost.saved)]
        inputs = [x for x, keep in zip((q, k, v), cost.keeps, strict=True) if keep]
        ctx.save_for_backward(*inputs, *((out,) if cost.keeps_output else ()), *extra)
        ctx.shapes, ctx.cost = (q.shape, k.shape, v.shape), cost
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scratch = _bytes(grads[0], ctx.cost.backward)
        out = tuple(grads[0].new_empty(shape) for shape in ctx.shapes)
        del scratch
        return (*out, None)


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Part:
    """One block, or everything outside the blocks and the head."""

    saved: int
    """Bytes alive from the forward to the backward."""
    kept: int
    """Bytes of the products' results: what selective checkpointing keeps."""
    forward: tuple[Operator, ...] = field(repr=False)
    backward: tuple[Operator, ...] = field(repr=False)

    def __sub__(self, other: Part) -> Part:
        """What is left without `other`; of its calls each is removed once."""
        rest = list(self.forward), list(self.backward)
        for mine, removed in zip(rest, (other.forward, other.backward), strict=True):
            for operator in removed:
                if operator in mine:
                    mine.remove(operator)
        return Part(self.saved - other.saved, self.kept - other.kept, *map(tuple, rest))


@dataclass(frozen=True, slots=True)
class DryRun:
    """A packed row through the backbone: `ends` plus one `block` per layer."""

    block: Part
    ends: Part
    """Everything else, minus what the first block of a frozen model need not save."""
    outside: int
    """Bytes saved by embedding and last norm alone."""
    block_input: int
    """Bytes of the tensor between two blocks."""
    forward_scratch: int
    """Bytes that a forward needs beyond what it saves, at its worst moment."""
    backward_scratch: int
    """Bytes that a backward needs beyond what was saved, at its worst moment; one weight's gradient at a time."""


def dry_run(
    config: PretrainedConfig,
    tokens: int,
    rows: int,
    *,
    dtype: torch.dtype,
    tuning: LoraSettings | FullSettings | None,
    attention: AttentionCost,
    fused_lora: bool = True,
) -> DryRun:
    """Run forward and backward of a packed row through models with one and two of the config's blocks.

    Args:
        config: a causal LM's config; for a rank of a tensor-parallel group, the part that this rank holds.
        tokens: tokens of the packed row.
        rows: response tokens, whose hidden states the loss reads.
        dtype: dtype of frozen weights and activations.
        tuning: which weights train; None is scoring, which saves nothing.
        attention: memory of the device's attention operator for this row.
        fused_lora: whether adapters run through `lora_linear`; else through peft's own forward.

    Raises:
        ConfigError: transformers knows no causal LM for the config, or it lacks the LoRA's targets.
    """
    given = _Given(tokens, rows, dtype, tuning, attention, fused_lora)
    (one, *_), (two, *sizes) = (_run(config, n, given) for n in (1, 2))
    block = two - one
    ends = one - block
    outside = ends.saved
    if isinstance(tuning, LoraSettings):
        outside = _run(config, 1, given, whole_first=True)[0].saved - block.saved
    return DryRun(block, ends, outside, *sizes)


@dataclass(frozen=True, slots=True)
class _Given:
    """The arguments of `dry_run` beside the config."""

    tokens: int
    rows: int
    dtype: torch.dtype
    tuning: LoraSettings | FullSettings | None
    attention: AttentionCost
    fused_lora: bool


def _run(
    config: PretrainedConfig, num_layers: int, given: _Given, *, whole_first: bool = False
) -> tuple[Part, int, int, int]:
    """Run one model: (the whole model, the last three fields of `DryRun`).

    With `whole_first` the first block's input takes gradient, so it saves what every block does.
    """
    tuning, dtype = given.tuning, given.dtype
    model = meta_model(with_layers(config, num_layers))
    nn.Module.to(model, dtype).eval().requires_grad_(False)
    outer: nn.Module = model
    if isinstance(tuning, LoraSettings):
        with torch.device("meta"):
            outer = lora.new_adapter(model, tuning, seed=0)
        if given.fused_lora:
            use_fused_lora(outer)
    elif tuning is not None:
        model.requires_grad_(True)
    trained = [p for p in outer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    if whole_first and tuning is not None:
        source = torch.zeros((), dtype=dtype, device="meta", requires_grad=True)  # a large leaf would count as saved
        model.get_input_embeddings().register_forward_hook(lambda *args: args[2] + source)
    ids, positions = (torch.empty(1, given.tokens, dtype=torch.int64, device="meta") for _ in range(2))
    picked = torch.empty(given.rows, dtype=torch.int64, device="meta")
    weights = (*outer.parameters(), *outer.buffers(), *(p.grad for p in trained if p.grad is not None))
    recorder = Recorder((*weights, ids, positions, picked))
    with attention_hook(model), recorder, torch.set_grad_enabled(tuning is not None):
        states = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, attention_context=_StandIn(given.attention)
        ).last_hidden_state[0]
        block_input = states.numel() * states.element_size()
        out = states[picked]
        del states
        saved = recorder.live - out.numel() * out.element_size()
        forward_scratch, kept = recorder.peak - saved, recorder.kept
        forward = tuple(recorder.operators)
        recorder.operators.clear()
        backward_scratch = 0
        if tuning is not None:
            recorder.peak = recorder.live
            out.backward(torch.empty_like(out))
            backward_scratch = recorder.peak - saved
    whole = Part(saved, kept, forward, tuple(recorder.operators))
    return whole, block_input, forward_scratch, backward_scratch


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model's config with fewer blocks, all of the most common kind."""
    small = copy.deepcopy(config.get_text_config())
    small.num_hidden_layers = num_layers
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[-num_layers:]
    for name, value in (("first_k_dense_replace", 0), ("mlp_only_layers", [])):
        if hasattr(small, name):
            setattr(small, name, value)
    return small
