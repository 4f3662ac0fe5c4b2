"""What prefill and decoding over slots and over blocks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macpo.engine.errors import ConfigError
from macpo.kernels import Segments


def _packed(lengths: Sequence[int], device: torch.device) -> tuple[Segments, Tensor]:
    """Prompts beside each other, and the row of each one's last token [prompts]."""
    segments = Segments.from_lengths([(length, []) for length in lengths]).to(device)
    return segments, (torch.tensor(list(lengths)).cumsum(0) - 1).to(device)


def _layer(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ConfigError(f"{type(module).__name__} does not know its layer index", "use another architecture")
    return index
