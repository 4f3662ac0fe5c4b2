"""FLOP of a training step: the matrix products of a causal LM, exactly, from its config alone.

A multiply-add is 2 FLOP. Only matrix products and attention count; norms, activations and softmax do not, as is usual
(PaLM, arXiv 2204.02311, appendix B). What this project's step skips is not counted either: a shared prompt counts once,
attention counts the pairs of tokens that see each other, the head counts response tokens. With u = one head product
over the response tokens, scoring costs 1u, training with a frozen head 2u, with a trained head 3u.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.errors import ConfigError, one_line
from macpo.engine.models.activations import blocks_of
from macpo.engine.models.loading import quiet_transformers
from macpo.engine.models.tuning.text_path import only_text

Tuning = Literal["lora", "full"]
Targets = Sequence[str] | Literal["all-linear"]

_READS_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
_PARALLEL_MLP = {"up_proj", "gate_proj", "gate_up_proj", "fc1", "fc_in", "dense_h_to_4h", "c_fc"}
_PARALLEL_TYPES = {"phi", "cohere", "cohere2", "gptj", "codegen", "falcon"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix; in a mixture of experts, the weights of one kind of all experts together."""

    name: str
    inputs: int
    outputs: int
    count: int = 1
    """How many there are."""
    active: float = 1.0
    """How many of them one token is multiplied with."""
    linear: bool = True
    """Whether it is a linear module, which an adapter can sit on."""
    reads_input: bool = False
    """Whether it reads its block's input, which takes no gradient in the first block of a frozen model."""

    @property
    def numel(self) -> int:
        return self.count * self.inputs * self.outputs

    @property
    def flops(self) -> float:
        """FLOP of the product with one token."""
        return 2.0 * self.active * self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder block."""

    matrices: tuple[Matrix, ...]
    vectors: int
    """Parameters of norms and biases."""
    window: int | None
    """Keys that a token sees at most; None is all."""

    @property
    def num_parameters(self) -> int:
        return self.vectors + sum(m.numel for m in self.matrices)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that FLOP and memory depend on."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    qk_dim: int
    """Size of a head's queries and keys."""
    v_dim: int
    """Size of a head's values."""
    vocab: int
    tied: bool
    """Whether the output layer is the embedding."""
    layers: tuple[LayerShape, ...]
    others: int
    """Parameters outside the blocks and the head: token and position embeddings, the last norm."""
    head_bias: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """The shape of the causal LM that transformers builds for a config; no weight is allocated.

        Raises:
            ConfigError: transformers knows no causal LM for the config, or its blocks are not found.
        """
        text = config.get_text_config()
        return _shape(text.model_type, text.to_json_string(use_diff=False))

    @property
    def num_parameters(self) -> int:
        head = 0 if self.tied else self.vocab * self.hidden
        return sum(layer.num_parameters for layer in self.layers) + self.others + head + self.vocab * self.head_bias

    @property
    def num_active(self) -> float:
        """Weights of the blocks that one token is multiplied with."""
        return sum(m.flops for layer in self.layers for m in layer.matrices) / 2

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct windows of the layers."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    def adapted(self, targets: Targets) -> list[Matrix]:
        """The adapted matrices of all blocks; adapters that peft puts on stacked experts are not counted."""
        return [m for layer in self.layers for m in layer.matrices if is_target(m, targets)]

    def adapter_parameters(self, rank: int, targets: Targets) -> int:
        """Number of LoRA weights, including those on the head if it is a target."""
        head = rank * (self.hidden + self.vocab) if head_is_target(targets) else 0
        return sum(rank * (m.inputs + m.outputs) for m in self.adapted(targets)) + head


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts that the FLOP of packed rows depend on; counts of several rows add up."""

    tokens: int
    """Tokens of the packed rows; a shared prompt counts once."""
    rows: int
    """Response tokens: each reaches the head once."""
    attended: int
    """Sum over tokens of the keys that each sees, under the shared-prefix rule and no window."""
    windowed: tuple[tuple[int, int], ...] = ()
    """(window, attended) for each sliding window."""

    def attended_in(self, window: int | None) -> int:
        """Attended pairs of a layer with that window; all pairs if the window has no count of its own."""
        return dict(self.windowed).get(window, self.attended) if window is not None else self.attended

    def __add__(self, other: Counts) -> Counts:
        windowed = {w: n + other.attended_in(w) for w, n in self.windowed}
        return Counts(
            self.tokens + other.tokens, self.rows + other.rows, self.attended + other.attended, tuple(windowed.items())
        )


def counts_of(groups: Iterable[PrefixGroup], windows: Sequence[int] = ()) -> Counts:
    """Counts of packed groups; `windows` are the model's (`ModelShape.windows`)."""
    items = [(len(group.prompt_ids), [len(response) for response in group.responses]) for group in groups]
    return counts_of_lengths(items, windows)


def counts_of_lengths(groups: Sequence[tuple[int, Sequence[int]]], windows: Sequence[int] = ()) -> Counts:
    """Counts of groups given as (prompt tokens, [tokens of each response])."""

    def pairs(window: int | None) -> int:
        return sum(
            _seen(prompt, window) + sum(_seen(prompt + n, window) - _seen(prompt, window) for n in responses)
            for prompt, responses in groups
        )

    rows = sum(sum(responses) for _, responses in groups)
    tokens = rows + sum(prompt for prompt, _ in groups)
    return Counts(tokens, rows, pairs(None), tuple((window, pairs(window)) for window in windows))


def _seen(length: int, window: int | None) -> int:
    """Sum over the first `length` positions of the keys that each sees."""
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * (window or 0)


def forward_flops(shape: ModelShape, counts: Counts) -> float:
    """One forward of a frozen or full model: blocks, attention and one head product (scoring, reference)."""
    return _blocks(shape, counts) + _attention(shape, counts) + _head(shape, counts)


def model_flops(
    shape: ModelShape, counts: Counts, *, tuning: Tuning, rank: int = 0, targets: Targets = "all-linear"
) -> float:
    """FLOP that one training step over `counts` mathematically requires: the numerator of MFU.

    Args:
        tuning: `full` counts every product three times. `lora` counts forward and dX of a frozen weight, only the
            forward where the first block's inputs take no gradient, and an adapter's products three times. Attention
            and the MLP of the first block count as if all their inputs took gradient.
        rank, targets: the adapter's.
    """
    attention = 3 * _attention(shape, counts)
    if tuning == "full":
        return 3 * (_blocks(shape, counts) + _head(shape, counts)) + attention
    first = [m for m in shape.layers[0].matrices if m.reads_input]
    unneeded = sum(m.flops for m in first) + sum(2.0 * rank * m.inputs for m in first if is_target(m, targets))
    blocks = 2 * _blocks(shape, counts) - unneeded * counts.tokens
    head = 2 * _head(shape, counts)
    if head_is_target(targets) and rank:  # its product B A is added to the weight, so the whole weight takes gradient
        head = 3 * (_head(shape, counts) + 2.0 * rank * shape.hidden * shape.vocab)
    return blocks + 3 * _adapters(shape, counts, rank, targets) + attention + head


def is_target(matrix: Matrix, targets: Targets) -> bool:
    """Whether a LoRA with these `target_modules` sits on the matrix."""
    return matrix.linear and (targets == "all-linear" or matrix.name in targets)


def head_is_target(targets: Targets) -> bool:
    return targets != "all-linear" and "lm_head" in targets


def _blocks(shape: ModelShape, counts: Counts) -> float:
    return 2.0 * shape.num_active * counts.tokens


def _adapters(shape: ModelShape, counts: Counts, rank: int, targets: Targets) -> float:
    return 2.0 * rank * sum(m.inputs + m.outputs for m in shape.adapted(targets)) * counts.tokens


def _attention(shape: ModelShape, counts: Counts) -> float:
    scores = 2.0 * shape.heads * shape.qk_dim * sum(counts.attended_in(layer.window) for layer in shape.layers)
    return scores * (shape.qk_dim + shape.v_dim) / shape.qk_dim


def _head(shape: ModelShape, counts: Counts) -> float:
    return 2.0 * counts.rows * shape.hidden * shape.vocab


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The config's causal LM on the meta device. Raises ConfigError if transformers knows none for it."""
    try:
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError) as error:
        why = one_line(error)
        fix = "use one that transformers knows"
        raise ConfigError(f"no causal LM can be built from the config ({why})", fix) from None
    assert isinstance(model, PreTrainedModel)
    return model


@lru_cache(maxsize=32)
def _shape(model_type: str, config_json: str) -> ModelShape:
    config: Any = AutoConfig.for_model(model_type, **_plain(config_json))
    num_layers = config.num_hidden_layers
    differs = ("expert", "moe", "block_type", "per_layer_config")
    alike = not any(word in key for key in config.to_dict() for word in differs)
    model = meta_model(_first_block(config) if alike else config)
    blocks = list(blocks_of(only_text(model)))
    head: Any = model.get_output_embeddings()
    tied = bool(config.tie_word_embeddings)
    vocab, hidden = head.weight.shape
    heads = _largest(config, "num_attention_heads")
    assert heads is not None
    head_dim = _largest(config, "head_dim") or hidden // heads
    layers = tuple(_layer(blocks[index if len(blocks) > 1 else 0], config, index) for index in range(num_layers))
    bias = head.bias is not None
    total = sum(p.numel() for p in model.parameters())  # a tied weight is one parameter
    own_head = (0 if tied else vocab * hidden) + vocab * bias
    return ModelShape(
        model_type=model_type,
        hidden=hidden,
        heads=heads,
        kv_heads=_largest(config, "num_key_value_heads") or heads,
        qk_dim=_largest(config, "qk_head_dim") or head_dim,
        v_dim=_largest(config, "v_head_dim") or head_dim,
        vocab=vocab,
        tied=tied,
        layers=layers,
        others=total - own_head - sum(layer.num_parameters for layer in layers[: len(blocks)]),
        head_bias=bias,
    )


def _largest(config: Any, name: str) -> int | None:
    """A size of the configuration, that of the largest layer where it differs by layer (Gemma 4's heads)."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)
    return max((size for layer in layers if (size := getattr(layer, name, None))), default=None)


def _first_block(config: Any) -> PretrainedConfig:
    """All blocks of a dense model have the same weights, so one of them is built."""
    small: PretrainedConfig = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    return small


def _plain(config_json: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config_json)
    return {key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}


def _layer(block: nn.Module, config: Any, index: int) -> LayerShape:
    parallel = getattr(config, "use_parallel_residual", config.model_type in _PARALLEL_TYPES)
    reads = _READS_INPUT | (_PARALLEL_MLP if parallel else set())
    active = getattr(config, "num_experts_per_tok", None) or 1
    linears = {f"{name}.weight" for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    matrices = []
    for name, parameter in block.named_parameters():
        path = name.removesuffix(".weight")
        last = path.rpartition(".")[2]
        if last.endswith("bias"):  # of stacked experts it has two dimensions
            continue
        if parameter.dim() == 2:
            outputs, inputs = parameter.shape
            matrices.append(Matrix(last, inputs, outputs, linear=name in linears, reads_input=last in reads))
        elif parameter.dim() == 3:
            count, outputs, inputs = parameter.shape
            matrices.append(Matrix(last, inputs, outputs, count, float(min(active, count)), linear=False))
    vectors = sum(p.numel() for p in block.parameters()) - sum(m.numel for m in matrices)
    return LayerShape(tuple(matrices), vectors, _window(config, index))


def _window(config: Any, index: int) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[index] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None
