"""The part of a model that text goes through, where its class wraps a language model with others, such as for images.

For some image-text models (Gemma 3) transformers' AutoModelForCausalLM gives the whole wrapper. Text alone uses its
language model, embedding and output layer; the rest is neither adapted, nor decayed, nor changed in what is written.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel


def outside_text(model: PreTrainedModel) -> list[str]:
    """Names of the outermost modules with weights that text does not go through; empty for a plain language model."""
    if model.config.get_text_config() is model.config:
        return []
    used = {id(parameter) for part in _text_parts(model) for parameter in part.parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        weights = [id(parameter) for parameter in module.parameters()]
        if weights and used.isdisjoint(weights) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def outside_pattern(model: PreTrainedModel) -> str | None:
    """A regular expression of the full names of modules outside the text path, for peft; None if there are none."""
    names = outside_text(model)
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None


def freeze_outside_text(model: PreTrainedModel) -> None:
    """Train no weight that text does not go through: it would get no gradient, but weight decay."""
    for name in outside_text(model):
        model.get_submodule(name).requires_grad_(False)


def _text_parts(model: PreTrainedModel) -> list[nn.Module]:
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if isinstance(part, nn.Module)]
