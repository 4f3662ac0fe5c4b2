"""Which models the engine takes, told from their configuration alone, before any weight is loaded.

Packed shared-prefix rows need an attention that asks, token by token, which other tokens a query sees. What keeps
another memory of the row (recurrent, convolutional, chunked or bidirectional layers) would mix the responses that share
a prompt; it is refused here by name. What a configuration cannot tell, the probe of `equivalence.py` finds at first
use.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from macpo.engine.errors import ConfigError

FIX = "use a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma 3 or Phi"
TEXT_ONLY = "use the text-only model of the family, or a decoder-only one such as Llama, Qwen, Mistral, Gemma 3 or Phi"
ROUTER_OFF = 'set "output_router_logits": false in the model\'s config.json to train without it'
_PACKED_LAYERS = {"full_attention", "sliding_attention"}
# What neither layer types nor classes say; tests/docs/test_compatibility_page.py compares the list with the probe.
_KNOWN = {
    "bloom": "adds ALiBi's biases to its attention",
    "doge": "attends under a mask that it makes from its keys and values",
    "modernbert-decoder": "has a prediction head between its last hidden state and its output layer",
    "nemotron": "does not hand the forward's keywords to its attention",
    "stablelm": "does not hand the forward's keywords to its attention",
}


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Refuse a model that cannot be trained, scored or generated with; a function of the configuration alone.

    Raises:
        ConfigError: naming the model's class, or its type where it has none, and the reason.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    try:
        reason = _reason(config, kind)
    except (TypeError, AttributeError, ValueError, KeyError) as error:  # parts of other types than the family has
        raise ConfigError(f"the config is not one of a model that can be built ({error})", FIX) from error
    if reason:
        name = config.model_type if kind is None else kind.__name__
        raise ConfigError(f"{name} {reason}", TEXT_ONLY if kind is None and config.sub_configs else FIX)


def _reason(config: PreTrainedConfig, kind: Any) -> str:
    """Why a model of class `kind` (None: transformers has none) is refused; empty if it is not."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder, whose prompt does not share a row with the responses"
    text = config.get_text_config()
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "attends in both directions (is_decoder is false)"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "attends in both directions (use_bidirectional_attention)"
    layers = getattr(text, "layer_types", None)
    odd = sorted(set(layers or ()) - _PACKED_LAYERS)
    if odd:
        return f"has layers of type {', '.join(odd)}, which cannot share a prompt"
    if getattr(text, "attn_temperature_tuning", False):  # beyond some thousand tokens, where no probe reaches
        return "scales its queries by their place in the row instead of their position (attn_temperature_tuning)"
    if any(getattr(part, "alibi", False) for part in (text, getattr(text, "attn_config", None))):
        return _KNOWN["bloom"]
    if kind is None:  # a model's own code, which only the probe can judge
        return "" if getattr(config, "auto_map", None) else "is no causal language model in transformers"
    if not layers and kind._is_stateful:
        return "is recurrent: its state runs through the whole row, across responses that share a prompt"
    if text.model_type in _KNOWN:
        return _KNOWN[text.model_type]
    if not kind._can_set_attn_implementation():
        return "does not use transformers' attention interface"
    return ""


def router_loss_coefficient(config: PreTrainedConfig) -> float:
    """The factor of the load-balancing loss that training adds; 0 unless the configuration asks for that loss."""
    text: Any = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    dbrx = getattr(getattr(text, "ffn_config", None), "moe_loss_weight", None)
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return float(next((c for c in (*(getattr(text, name, None) for name in names), dbrx) if c is not None), 0.0))
