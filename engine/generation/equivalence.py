"""Checks that packed prefill and cached decoding give the model's own logits, before a model generates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.generation.batch_runner import next_logits
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.slots.attention import DecodeAttention, PrefillAttention
from macpo.engine.generation.slots.cache import SlotCache
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.equivalence import FIX, check_path, check_windows, expected_window, probes_of, separate_logits


def verified_cache_shapes(model: PreTrainedModel) -> dict[int, CacheShape]:
    """What each layer caches, once the probe's last tokens, decoded over a cache, have the model's own logits.

    The model must be in eval mode and gradients off.

    Raises:
        ConfigError: the attention hook cannot honour the architecture, which the error names.
    """
    window, probes = expected_window(model), probes_of(model)
    device = model.device
    ids = torch.tensor([sequence for probe in probes for sequence in probe.sequences], device=device)
    num_rows, length = ids.shape
    starts = torch.tensor([probe.start for probe in probes for _ in probe.sequences], device=device)
    shapes: dict[int, CacheShape] = {}

    def cached() -> Tensor:
        cache = SlotCache(num_rows, length)
        slots = torch.arange(num_rows, device=device)
        with attention_hook(model):
            prefill = PrefillAttention(cache, [length - 1] * num_rows, slots[:, None].tolist(), device)
            positions = prefill.segments.positions() + starts.repeat_interleave(length - 1)
            next_logits(model, ids[:, :-1].flatten(), positions, prefill, None)
            num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
            if len(cache.shapes()) != num_layers:
                text = f"{len(cache.shapes())} of its {num_layers} layers use transformers' attention interface"
                raise ConfigError(text, FIX)
            last = torch.full_like(starts, length - 1)
            decode = DecodeAttention(cache, slots, last, torch.arange(length, device=device))
            logits = next_logits(model, ids[:, -1], last + starts, decode, None).float()
        check_windows(model, decode.windows, window)
        shapes.update(cache.shapes())  # of the last run, which is in the model's own dtype
        return logits.unflatten(0, (len(probes), -1))

    def separate() -> Tensor:
        return torch.stack([separate_logits(model, probe)[:, -1] for probe in probes])

    check_path(model, "cached", cached, separate)
    return shapes
