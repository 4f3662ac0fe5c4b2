"""Checks that packed prefill and cached decoding give the model's own logits, before a model generates."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.generation.batch_runner import next_logits
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.slots.attention import DecodeAttention, PrefillAttention
from macpo.engine.generation.slots.cache import SlotCache
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.equivalence import (
    check_logits,
    check_windows,
    expected_window,
    probe_group,
    refusals,
    separate_logits,
)
from macpo.engine.models.support import FIX


def verified_cache_shapes(model: PreTrainedModel) -> dict[int, CacheShape]:
    """What each layer caches, once the probe's last token, decoded over a cache, has the model's own logits.

    The model must be in eval mode and gradients off.

    Raises:
        ConfigError: the attention hook cannot honour the architecture, which the error names.
    """
    with refusals(model):
        window = expected_window(model)
        group = probe_group(model)
        expected = torch.stack([logits[-1] for logits in separate_logits(model, group)])
        sequences = [torch.tensor(group.prompt_ids + response, device=model.device) for response in group.responses]
        lengths = [len(ids) - 1 for ids in sequences]
        cache = SlotCache(len(sequences), max(lengths) + 1)
        with attention_hook(model):
            slots = torch.arange(len(sequences), device=model.device)
            prefill = PrefillAttention(cache, lengths, slots[:, None].tolist(), model.device)
            prompts = torch.cat([ids[:-1] for ids in sequences])
            next_logits(model, prompts, prefill.segments.positions(), prefill, None)
            num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
            if len(cache.shapes()) != num_layers:
                text = f"{len(cache.shapes())} of its {num_layers} layers use transformers' attention interface"
                raise ConfigError(text, FIX)
            positions = torch.tensor(lengths, device=model.device)
            decode = DecodeAttention(cache, slots, positions, torch.arange(cache.slot_tokens, device=model.device))
            got = next_logits(model, torch.stack([ids[-1] for ids in sequences]), positions, decode, None).float()
        check_windows(model, decode.windows, window)
        check_logits(model, "cached", got, expected)
    return cache.shapes()
