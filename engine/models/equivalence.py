"""Checks that the engine's own paths through a model compute what the model itself computes, before it is used.

transformers has some 350 architectures; a list of those that work would be wrong tomorrow. So a model's first use
compares the logits of a few tokens, and whatever differs (recurrent layers, a head with an unknown scale, custom
attention) is refused with an error that names the architecture. `verify` checks packed rows for training and scoring;
`engine/generation/equivalence.py` checks prefill and decoding through a cache with the same probe.

L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.data.pack import PrefixGroup, pack
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import PackedAttention, attention_hook
from macpo.engine.models.head import head_of
from macpo.engine.models.loading import embedding_rows
from macpo.kernels import AttentionForm, Segments

FIX = "use a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma 3 or Phi"
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference relative to the largest logit: a few thousand roundings in float32, a few hundred in bfloat16
(8 bits)."""
_VERIFIED = "_macpo_verified"  # an attribute of the module, which copies of the module carry along


@dataclass
class _Recorder:
    """Packed attention that records the windows the layers ask for."""

    segments: Segments
    windows: set[int | None] = field(default_factory=set)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        self.windows.add(form.window)
        return PackedAttention(self.segments).attend(module, q, k, v, form)


@torch.no_grad()
def verify(base: PreTrainedModel) -> None:
    """Compare the packed path with plain forwards on one small group; done once per model.

    Raises:
        ConfigError: naming the architecture and what differs.
    """
    if getattr(base, _VERIFIED, False):
        return
    window = expected_window(base)
    head = head_of(base)  # outside of `refusals`, because its errors have remedies of their own
    with refusals(base):
        group = probe_group(base)
        (batch,) = pack([group], max_tokens=64)
        batch = batch.to(base.device)
        recorder = _Recorder(batch.segments)
        with attention_hook(base):
            out = base.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, attention_context=recorder
            )
        check_windows(base, recorder.windows, window)
        hidden = out.last_hidden_state[0][batch.rows]
        packed = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
        if head.softcap is not None:
            packed = head.softcap * torch.tanh(packed / head.softcap)
        separate = [logits[len(group.prompt_ids) - 1 : -1] for logits in separate_logits(base, group)]
        check_logits(base, "packed", packed, torch.cat(separate))
    setattr(base, _VERIFIED, True)


def probe_group(model: PreTrainedModel) -> PrefixGroup:
    """The probe's token ids: a prompt of 3 with responses of 2 and 3."""
    num_ids = embedding_rows(model)
    ids = [i % num_ids for i in range(3, 11)]
    return PrefixGroup(ids[:3], [ids[3:5], ids[5:8]])


def separate_logits(model: PreTrainedModel, group: PrefixGroup) -> list[Tensor]:
    """The model's own float32 logits [L, V] of the prompt with each response, one plain forward per sequence."""
    sequences = [torch.tensor([group.prompt_ids + response], device=model.device) for response in group.responses]
    return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in sequences]


def check_windows(model: PreTrainedModel, windows: Collection[int | None], expected: int | None) -> None:
    """Raises ConfigError where no layer came through the hook, or none asked for the expected sliding window."""
    if not windows:
        raise ConfigError(f"{type(model).__name__} does not attend through transformers' attention interface", FIX)
    if expected is not None and expected not in windows:
        text = f"has a sliding window of {expected} but does not pass it to the attention"
        raise ConfigError(f"{type(model).__name__} {text}", FIX)


def check_logits(model: PreTrainedModel, path: str, got: Tensor, separate: Tensor) -> None:
    """Raises ConfigError where the logits of a path differ from those of separate forwards beyond TOLERANCE.

    Logits of separate forwards that are not finite pass: whoever uses them reports that.
    """
    error = ((got - separate).abs().max() / separate.abs().max().clamp_min(1e-6)).item()
    if separate.isfinite().all() and not error <= TOLERANCE.get(model.dtype, 1e-1):
        text = f"{path} and separate forwards differ by {error:.1e} of the largest logit"
        raise ConfigError(f"{type(model).__name__}: {text}", FIX)


def expected_window(model: PreTrainedModel) -> int | None:
    """The sliding window that some layer must ask for; raises ConfigError for layer types that cannot be packed."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    odd = sorted(set(layers or ()) - {"full_attention", "sliding_attention"})
    if odd:
        text = f"has layers of type {', '.join(odd)}, which cannot share a prompt"
        raise ConfigError(f"{type(model).__name__} {text}", FIX)
    slides = "sliding_attention" in layers if layers is not None else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


@contextmanager
def refusals(model: PreTrainedModel) -> Iterator[None]:
    """Turns what a probe's forward raises into a ConfigError that names the architecture and says what to use."""
    name = type(model).__name__
    try:
        yield
    except (ConfigError, TypeError, ValueError) as error:
        text = error.problems[0].message if isinstance(error, ConfigError) else str(error).partition("\n")[0]
        raise ConfigError(text if name in text else f"{name}: {text}", FIX) from error
