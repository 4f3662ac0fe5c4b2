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
    modules = dict(model.named_modules())
    weights = {name: {id(parameter) for parameter in module.parameters()} for name, module in modules.items()}
    used = {id(parameter) for part in _text_parts(model) for parameter in part.parameters()}
    found: list[str] = []
    for name in modules:
        other = weights[name] and (used.isdisjoint(weights[name]) or _is_tower(modules[name], model))
        if other and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return list(dict.fromkeys(_widest(name, weights, model) for name in found))


def only_text(model: PreTrainedModel) -> PreTrainedModel:
    """The model without what text does not go through, which is taken out in place: to count, not to compute with."""
    for name in outside_text(model):
        model.set_submodule(name, nn.Identity())
    return model


def _is_tower(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether it is a model of another kind inside, such as an image encoder, which has a config of its own kind."""
    own = {type(model.config), type(model.config.get_text_config())}
    return isinstance(module, PreTrainedModel) and type(module.config) not in own


def _widest(name: str, weights: dict[str, set[int]], model: PreTrainedModel) -> str:
    """The outermost module around one that text does not go through, such as an encoder with its projection."""
    ends = {id(p) for part in _ends(model) for p in part.parameters()}
    while (outer := name.rpartition(".")[0]) and weights[outer].isdisjoint(ends):
        name = outer
    return name


def outside_pattern(model: PreTrainedModel) -> str | None:
    """A regular expression of the full names of modules outside the text path, for peft; None if there are none."""
    names = outside_text(model)
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None


def freeze_outside_text(model: PreTrainedModel) -> None:
    """Train no weight that text does not go through: it would get no gradient, but weight decay."""
    for name in outside_text(model):
        model.get_submodule(name).requires_grad_(False)


def _text_parts(model: PreTrainedModel) -> list[nn.Module]:
    """What text goes through; where the config has no part for text alone, that is the whole model."""
    if model.config.get_text_config() is model.config:
        return [model]
    return [part for part in (model.get_decoder(), *_ends(model)) if isinstance(part, nn.Module)]


def _ends(model: PreTrainedModel) -> list[nn.Module]:
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if isinstance(part, nn.Module)]
