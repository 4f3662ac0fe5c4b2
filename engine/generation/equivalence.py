"""Whether packed prefill and cached decoding give the model's own logits; compared before a model generates."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from macpo.engine.errors import ConfigError
from macpo.engine.generation.model_facts import LayerShape
from macpo.engine.generation.slots.attention import DecodeAttention, PrefillAttention
from macpo.engine.generation.slots.cache import SlotCache
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.equivalence import expected_window
from macpo.engine.models.loading import embedding_rows

log = logging.getLogger(__name__)


PROBE_LENGTHS = (3, 6)
"""Tokens of the two probe sequences."""


def hooked_layers(model: PreTrainedModel) -> dict[int, LayerShape] | None:
    """What each layer caches, if packed prefill and cached decoding through the hook give the model's own logits.

    Two short sequences; the model must be in eval mode and gradients off. Else None, and one warning says why.
    """
    cache = SlotCache(len(PROBE_LENGTHS), max(PROBE_LENGTHS))
    try:
        why = _probe(model, cache)
    except (ConfigError, TypeError, ValueError) as error:
        why = str(error).removeprefix("error: ").splitlines()[0]
    if why:
        log.warning("%s is generated with by its own generate(), which is slower: %s", type(model).__name__, why)
        return None
    return cache.shapes()


def _probe(model: PreTrainedModel, cache: SlotCache) -> str:
    """What is wrong with the hooked forward over a cache for the probe's sequences; empty where nothing is."""
    window = expected_window(model)
    device = model.device
    vocabulary = embedding_rows(model)
    sequences = [(torch.arange(n, device=device) * 7 + n) % vocabulary for n in PROBE_LENGTHS]
    expected = torch.stack([model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in sequences]).float()
    lengths = [n - 1 for n in PROBE_LENGTHS]
    with attention_hook(model):
        prefill = PrefillAttention(cache, lengths, [[0], [1]], device)
        prompts = torch.cat([ids[:-1] for ids in sequences])[None]
        keywords: dict[str, Any] = {"use_cache": False}
        model(input_ids=prompts, position_ids=prefill.segments.positions()[None], attention_context=prefill, **keywords)
        num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        if cache.num_layers != num_layers:
            return f"{cache.num_layers} of its {num_layers} layers use transformers' attention interface"
        positions = torch.tensor(lengths, device=device)
        columns = torch.arange(cache.slot_tokens, device=device)
        decode = DecodeAttention(cache, torch.arange(2, device=device), positions, columns)
        last = torch.stack([ids[-1] for ids in sequences])[None]
        got = (
            model(input_ids=last, position_ids=positions[None], attention_context=decode, **keywords).logits[0].float()
        )
    if window is not None and window not in decode.windows:
        return f"its sliding window of {window} does not reach the attention interface"
    if not expected.isfinite().all():
        return ""  # generating will say so
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return "" if error <= tolerance else f"its logits through the attention interface differ by {error:.1e}"
