"""Does the packed path compute what the model itself computes? Asked of every architecture before it is used.

transformers has some 350 architectures; a list of those that work would be wrong tomorrow. So a policy's first use
compares a few tokens, packed and separate, and whatever differs (recurrent layers, a head with an unknown scale,
custom attention) is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.data.pack import PrefixGroup, pack
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import PackedAttention, attention_hook
from macpo.engine.models.head import head_of
from macpo.engine.models.loading import embedding_rows
from macpo.kernels import Segments

_VERIFIED = "_macpo_verified"  # on the module; module copies carry it along
# Relative to the largest logit: a few thousand roundings in float32, a few hundred in bfloat16 (8 bits).
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class _Recorder:
    """Packed attention that notes which windows the layers asked for."""

    segments: Segments
    windows: set[int | None] = field(default_factory=set)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        self.windows.add(window)
        return PackedAttention(self.segments).attend(module, q, k, v, scale, window)


@torch.no_grad()
def verify(base: PreTrainedModel) -> None:
    """Compare the packed path with plain forwards on one small group; done once a model.

    Raises:
        ConfigError: naming the architecture and what differs.
    """
    if getattr(base, _VERIFIED, False):
        return
    name = type(base).__name__
    fix = "use a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma 3 or Phi"
    windows = expected_window(base)
    rows = embedding_rows(base)
    ids = [i % rows for i in range(3, 11)]
    group = PrefixGroup(ids[:3], [ids[3:5], ids[5:8]])
    (batch,) = pack([group], max_tokens=64)
    batch = batch.to(base.device)
    recorder = _Recorder(batch.segments)
    head = head_of(base)
    with attention_hook(base):
        out = base.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, attention_context=recorder
        )
    if not recorder.windows:
        raise ConfigError(f"{name} does not attend through transformers' attention interface", fix)
    if windows is not None and windows not in recorder.windows:
        raise ConfigError(f"{name} has a sliding window of {windows} but does not pass it to the attention", fix)
    hidden = out.last_hidden_state[0][batch.rows]
    packed = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.softcap is not None:
        packed = head.softcap * torch.tanh(packed / head.softcap)
    separate = []
    for response in group.responses:
        whole = torch.tensor([group.prompt_ids + response], device=base.device)
        separate.append(base(input_ids=whole, use_cache=False).logits[0, 2 : 2 + len(response)].float())
    wanted = torch.cat(separate)
    error = ((packed - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()
    if wanted.isfinite().all() and not error <= _TOLERANCE.get(base.dtype, 1e-1):
        raise ConfigError(f"{name}: packed and separate forwards differ by {error:.1e} of the largest logit", fix)
    setattr(base, _VERIFIED, True)


def expected_window(base: PreTrainedModel) -> int | None:
    """The sliding window that some layer must ask for; refuses layer types that cannot be packed."""
    config = base.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    odd = sorted(set(layers or ()) - {"full_attention", "sliding_attention"})
    if odd:
        raise ConfigError(
            f"{type(base).__name__} has layers of type {', '.join(odd)}, which cannot share a prompt",
            "use a model whose layers are full or sliding attention",
        )
    slides = "sliding_attention" in layers if layers is not None else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None
