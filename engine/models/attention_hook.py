"""One attention hook for every Hugging Face causal LM: the caller's context decides how tokens attend.

transformers calls the registered function once a layer with queries after RoPE and keys and values before
`repeat_kv`, and hands it every extra keyword of `model(...)`. So the metadata travels as one object:

    with attention_hook(model):
        model.base_model(input_ids=..., position_ids=..., use_cache=False, attention_context=PackedAttention(segments))

No mask function is registered under the hook's name; transformers then builds no mask, and does not read
restarting position ids as a new document. Source: transformers 5.x `AttentionInterface`, `masking_utils`.

B batch rows, T tokens of a row, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.models.rotary import rotary_per_sequence
from macpo.kernels import AttentionForm, Segments, prefix_attention
from macpo.kernels.wide_products import wide_products

HOOK_NAME = "macpo"
_OTHER_MODEL = "use a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma or Phi"


class AttentionContext(Protocol):
    """How the tokens of one forward attend; passed to the model as `attention_context=`."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        """Attention of one layer.

        Args:
            module: the layer's attention module; `module.layer_idx` is its index.
            q: [B, Hq, T, D], rotated.
            k, v: [B, Hkv, T, D] of the same T new tokens, rotated; a cache keeps them itself.
            form: the layer's scale, sliding window, softcap and sinks.

        Returns:
            [B, T, Hq, D].
        """
        ...


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Packed shared-prefix groups in one row (B = 1): training, scoring and reference log-probs."""

    segments: Segments

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        if q.shape[0] != 1:
            raise ValueError(f"packed attention takes one row of tokens, got {q.shape[0]}")
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return prefix_attention(q, k, v, self.segments, **form._asdict())[None]


def _hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function; raises ConfigError for options that it would otherwise silently ignore.

    A layer's softcap and sinks are keywords of the interface, `softcap` and `s_aux`.
    """
    if attention_context is None:
        problem = f"{type(module).__name__} did not get the keywords of the model's forward, which say how it attends"
        fix = "use an architecture that hands them on, like Llama; in code of your own, call the model outside the hook"
        raise ConfigError(problem, fix)
    if dropout > 0:
        problem = f"{type(module).__name__} drops attention weights at random, which packed attention does not"
        fix = "set the attention dropout in the model's config to 0 (attention_dropout, attn_pdrop)"
        raise ConfigError(problem, fix)
    refused = [name for name, has in _unsupported(module, attention_mask, kwargs) if has]
    if refused:
        problem = f"{type(module).__name__} has {', '.join(refused)}, which packed attention does not implement"
        raise ConfigError(problem, _OTHER_MODEL)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = AttentionForm(scale, sliding_window, kwargs.get("softcap"), _own(kwargs.get("s_aux")))
    size, value_size = query.shape[-1], value.shape[-1]
    if size != value_size:  # latent attention (DeepSeek): zeros add nothing to a dot product, and give zeros out
        query, key, value = (pad(x, (0, max(size, value_size) - x.shape[-1])) for x in (query, key, value))
    return attention_context.attend(module, query, key, value, form)[..., :value_size], None


def _unsupported(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    causal = kwargs.get("is_causal")
    return (
        ("an attention mask of its own", mask is not None),
        ("a softcap that its forward does not pass on", _unsaid(module, "attn_logit_softcapping", kwargs, "softcap")),
        ("sinks that its forward does not pass on", _unsaid(module, "sinks", kwargs, "s_aux")),
        ("bidirectional attention", (getattr(module, "is_causal", True) if causal is None else causal) is False),
        ("a position bias", kwargs.get("position_bias") is not None or kwargs.get("alibi") is not None),
        ("head masks", kwargs.get("head_mask") is not None),
    )


def _unsaid(module: nn.Module, attribute: str, kwargs: dict[str, Any], keyword: str) -> bool:
    return getattr(module, attribute, None) is not None and kwargs.get(keyword) is None


def _own(sinks: Tensor | None) -> Tensor | None:
    """The sinks of this rank's heads."""
    return sinks.to_local() if isinstance(sinks, DTensor) else sinks


AttentionInterface.register(HOOK_NAME, _hook)


def is_active(model: PreTrainedModel) -> bool:
    """Whether the hook is on for this model."""
    return model.config._attn_implementation == HOOK_NAME


@contextmanager
def attention_hook(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through the forward's `attention_context`; restores what was there before.

    Args:
        model: the Hugging Face model itself (`get_base_model()` of a peft wrapper).

    Nested use for the same model does nothing, so an outer loop may keep the hook active.

    Raises:
        ConfigError: the architecture does not use transformers' attention interface.
    """
    if is_active(model):
        yield
        return
    if not model._can_set_attn_implementation():
        raise ConfigError(f"{type(model).__name__} does not use transformers' attention interface", _OTHER_MODEL)
    with attention_by(HOOK_NAME, model), rotary_per_sequence(model), wide_products(model.dtype, model.device):
        yield


@contextmanager
def attention_by(name: str, model: PreTrainedModel) -> Iterator[None]:
    """Context in which all of the model attends by one of transformers' implementations; restores each part's own."""
    own = {id(config): (config, config._attn_implementation) for config in _configs(model)}
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, before in own.values():
            config._attn_implementation_internal = before


def _configs(model: PreTrainedModel) -> list[Any]:
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
