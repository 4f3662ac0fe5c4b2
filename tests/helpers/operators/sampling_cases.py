"""Sampling settings and logits that every backend is tested with."""

from __future__ import annotations

import torch

from macpo.kernels import SampleParams

SETTINGS = [
    {},
    {"temperature": 0.95, "top_p": 0.7, "top_k": 50},  # the paper's
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.9},
    {"top_p": 0.01},  # one token survives
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_k": 10_000, "top_p": 0.95, "min_p": 0.02},  # top_k above every vocabulary
    {"repetition_penalty": 1.3, "top_p": 0.8, "temperature": 0.7},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]


def make(batch, vocab, setting, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=g) * 3
    keys = torch.stack(
        [torch.randint(0, 2**62, (batch,), generator=g), torch.arange(batch) % 7, torch.arange(batch) % 3], 1
    )
    positions = torch.randint(0, 2000, (batch,), generator=g)
    seen = torch.rand(batch, vocab, generator=g) < 0.3 if "repetition_penalty" in setting else None
    return logits, SampleParams(11, **setting, seen=seen, batch=batch), keys, positions
