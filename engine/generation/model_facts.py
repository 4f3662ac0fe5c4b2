"""Facts that generation reads off a model: where its adapters are, its vocabulary, its end tokens, its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError


def unwrap(model: nn.Module) -> tuple[nn.Module, PreTrainedModel]:
    """(the module that holds adapters, the Hugging Face model) of a model, a peft wrapper or a PolicyModule."""
    outer: Any = model
    if not isinstance(outer, PreTrainedModel) and not hasattr(outer, "get_base_model"):
        outer = getattr(model, "model", None)
    base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    if not isinstance(base, PreTrainedModel):
        fix = "give a Hugging Face causal LM or peft model"
        raise ConfigError(f"cannot generate with a {type(model).__name__}", fix)
    return outer, base


def disabled(outer: nn.Module) -> bool:
    """Whether peft's adapters are switched off."""
    return any(getattr(module, "disable_adapters", False) is True for module in outer.modules())


def head_width(model: PreTrainedModel) -> int:
    """Number of columns of the logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{type(model).__name__} has no language-model head", "load it with AutoModelForCausalLM")
    return int(getattr(head, "out_features", head.weight.shape[0]))  # a rank may have a part of the weight


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """End tokens of the tokenizer, the generation config and the model config, each of which may hold a list."""
    sources = (tokenizer, model.generation_config, model.config, model.config.get_text_config())
    found: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


class CacheShape(NamedTuple):
    """Shape and dtype of what one layer caches per token."""

    num_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
