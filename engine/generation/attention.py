"""Helpers that the attention contexts over slots and over blocks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macpo.engine.errors import ConfigError
from macpo.kernels import Segments
from macpo.kernels.transfer import together


def packed_prompts(lengths: Sequence[int], device: torch.device) -> tuple[Segments, Tensor]:
    """Segments of prompts packed into one row, and the position of each prompt's last token in it [prompts]."""
    own = Segments.from_lengths([(length, []) for length in lengths])
    integers = (own.prefix_start, own.prefix_end, own.segment_start, torch.tensor(list(lengths)).cumsum(0) - 1)
    prefix_start, prefix_end, segment_start, last = together(integers, device)
    return Segments(prefix_start, prefix_end, segment_start, own.cu_groups), last


def layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ConfigError(f"{type(module).__name__} does not know its layer index", "use another architecture")
    return index
