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
from transformers import AttentionInterface, PreTrainedModel

from macpo.engine.errors import ConfigError
from macpo.engine.models.rotary import rotary_per_sequence
from macpo.kernels import Segments, prefix_attention

HOOK_NAME = "macpo"


class AttentionContext(Protocol):
    """How the tokens of one forward attend; passed to the model as `attention_context=`."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer.

        Args:
            module: the layer's attention module; `module.layer_idx` is its index.
            q: [B, Hq, T, D], rotated.
            k, v: [B, Hkv, T, D] of the same T new tokens, rotated; a cache keeps them itself.
            scale: factor of the dot products.
            window: a query sees keys at most `window - 1` positions back; None is unlimited.

        Returns:
            [B, T, Hq, D].
        """
        ...


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Packed shared-prefix groups in one row (B = 1): training, scoring and reference log-probs."""

    segments: Segments

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if q.shape[0] != 1:
            raise ValueError(f"packed attention takes one row of tokens, got {q.shape[0]}")
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return prefix_attention(q, k, v, self.segments, scale=scale, window=window)[None]


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
    """The registered function; raises ConfigError for options that it would otherwise silently ignore."""
    if attention_context is None:
        fix = "pass attention_context=..., or leave the attention_hook block before calling the model directly"
        raise ConfigError("the macpo attention hook is active but the forward got no attention_context", fix)
    refused = [name for name, bad in _unsupported(module, attention_mask, dropout, kwargs) if bad]
    if refused:
        problem = f"{type(module).__name__} asks for {', '.join(refused)}, which packed attention does not implement"
        raise ConfigError(problem, "use a model without it")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_context.attend(module, query, key, value, scale, sliding_window), None


def _unsupported(
    module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> tuple[tuple[str, bool], ...]:
    causal = kwargs.get("is_causal")
    return (
        ("an attention mask", mask is not None),
        ("attention dropout in training (call eval())", dropout > 0),
        ("attention softcap", any(_given(x) for x in (kwargs.get("softcap"), _softcap(module)))),
        ("attention sinks", kwargs.get("s_aux") is not None or hasattr(module, "sinks")),
        ("bidirectional attention", (getattr(module, "is_causal", True) if causal is None else causal) is False),
        ("a position bias", kwargs.get("position_bias") is not None or kwargs.get("alibi") is not None),
        ("head masks", kwargs.get("head_mask") is not None),
    )


def _given(value: object) -> bool:
    return value is not None and value != 0


def _softcap(module: nn.Module) -> float | None:
    return getattr(module, "attn_logit_softcapping", None)


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
    own = {id(config): (config, config._attn_implementation) for config in _configs(model)}
    if not model._can_set_attn_implementation():
        fix = "use an architecture that supports attn_implementation='sdpa' in transformers 5"
        raise ConfigError(f"{type(model).__name__} does not use transformers' attention interface", fix)
    model.set_attn_implementation(HOOK_NAME)
    try:
        with rotary_per_sequence(model):
            yield
    finally:
        for config, name in own.values():
            config._attn_implementation_internal = name


def _configs(model: PreTrainedModel) -> list[Any]:
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
