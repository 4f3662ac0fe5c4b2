"""What the drop-ins share: pairs as one packed row, a forward that takes it, and settings that none of them supports.

A trainer calls its wrapped model (DDP, autocast, peft) and never the backbone, so the packed row has to travel through
`model(...)`: `enable` lets the causal LM's own forward take `packed=` and `reduce=`, and leaves every other call alone.

L padded length, B pairs, N response tokens, H hidden size, T tokens of the packed row.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, pack, unshared
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.models.attention_hook import PackedAttention, attention_hook, is_active
from macpo.engine.models.head import Head
from macpo.engine.models.head import response_logps as head_logps
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.rotary import check_length, switch_length
from macpo.kernels import AttentionForm, Segments

Reduce = Callable[[Tensor, Head, PackedBatch], Any]
_MARK = "_macpo_packed_forward"
_JITTER = ("jitter_noise", "router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def padded_groups(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> list[PrefixGroup]:
    """Return the groups of a padded batch whose first half is chosen and whose second half is rejected.

    Chosen and rejected share a group where their prompts are equal; else (prompts cut on the left) each has its own.

    Args:
        input_ids, attention_mask, completion_mask: [2B, L] int64; the completion is the end of each row.

    Returns:
        Groups whose responses, in order, are c0, r0, c1, r1, ...

    Raises:
        DataError: a completion that is empty, starts without a prompt token, or is not the end of its row.
    """
    rows, keeps, marks = (x.cpu().tolist() for x in (input_ids, attention_mask, completion_mask))
    if len(rows) % 2:
        raise DataError(f"{len(rows)} rows cannot be pairs", "give chosen rows first, then as many rejected rows")
    parts = []
    for index, (row, keep, mark) in enumerate(zip(rows, keeps, marks, strict=True)):
        kept = [(token, m) for token, k, m in zip(row, keep, mark, strict=True) if k]
        start = next((i for i, (_, m) in enumerate(kept) if m), len(kept))
        if not all(m for _, m in kept[start:]):
            raise DataError(
                f"row {index}: the completion has gaps", "use a collator that marks all tokens after the prompt"
            )
        ids = [token for token, _ in kept]
        parts.append((ids[:start], ids[start:]))
    half = len(parts) // 2
    groups: list[PrefixGroup] = []
    for index, (chosen, rejected) in enumerate(zip(parts[:half], parts[half:], strict=True)):
        pair = (
            [PrefixGroup(chosen[0], [chosen[1], rejected[1]])]
            if chosen[0] == rejected[0]
            else [PrefixGroup(prompt, [response]) for prompt, response in (chosen, rejected)]
        )
        for group in pair:
            group.check(f"pair {index} of the batch")
        groups += pair
    return groups


def pack_in_order(groups: Sequence[PrefixGroup]) -> PackedBatch:
    """Pack all groups into one row, in the given order."""
    (batch,) = pack(groups, max_tokens=sum(group.num_tokens for group in groups), order="given")
    return batch


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside peft's wrapper, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ConfigError(f"{type(inner).__name__} is not a transformers model", "pass a causal LM or a PeftModel")
    return inner


def enable(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Let the model's forward take `packed=PackedBatch, reduce=...`; once a model, and nothing else changes.

    Then `model(packed=batch, reduce=f)` returns f(rows that predict a response token [N, H], head, batch).

    Returns:
        The model inside peft's wrapper.

    Raises:
        ConfigError: an architecture or adapter whose attention or head cannot be honoured, by name.
    """
    base = base_of(model)
    if base.config.is_encoder_decoder:
        raise ConfigError(f"{type(base).__name__} is an encoder-decoder", "use a decoder-only model")
    if getattr(base, _MARK, False):
        return base
    was_training, current = model.training, base.__dict__.get("forward")
    # The class's own forward: a trainer may already have put autocast around it, and the packed path has none.
    base.__dict__.pop("forward", None)
    policy = PolicyModule(model)  # compares the packed path with the model's own, and refuses what differs
    if current is not None:
        base.__dict__["forward"] = current
    model.train(was_training)
    if not policy.head().weight.is_floating_point():
        raise ConfigError("the output layer is quantised", "leave lm_head out of the quantisation")
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` and the trainers read the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        packed: PackedBatch | None = None,
        reduce: Reduce | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed is None or reduce is None:
            return original(*args, **kwargs)
        check_length(self, packed.max_length)
        packed = unshared(packed, switch_length(self)).to(self.device)
        with attention_hook(self):
            out = self.base_model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                attention_context=_MixedPrecisionAttention(packed.segments),
            )
        return reduce(*_head_inputs(out.last_hidden_state[0][packed.rows], policy.head()), packed)

    base.forward = types.MethodType(forward, base)
    setattr(base, _MARK, True)
    return base


def check_held(base: PreTrainedModel) -> None:
    """Raise ConfigError where a checkpointed backward would recompute with the model's own attention."""
    name = "is_activation_checkpointing"  # since transformers 5.23, where the older name warns
    checkpoints = getattr(base, name if hasattr(base, name) else "is_gradient_checkpointing")
    if torch.is_grad_enabled() and checkpoints and not is_active(base):
        raise ConfigError(
            "compute_loss was called outside training_step with gradient checkpointing on",
            "call training_step, or turn gradient_checkpointing off",
        )


def response_logps(rows: Tensor, head: Head, batch: PackedBatch) -> Tensor:
    """Return the log-prob of each response token, [N] float32, computed with mixed precision off."""
    with no_autocast(rows):
        return head_logps(rows, head, batch)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off: the operators choose their own precision, and it would round their float32 products."""
    return torch.autocast(x.device.type, enabled=False)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _head_inputs(rows: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Bring rows and head to one dtype on one device, as a linear layer under autocast would take them."""
    dtype = _autocast_dtype(rows.device) or head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return rows.to(head.weight.device, dtype), head._replace(weight=head.weight.to(dtype), bias=bias)


@dataclass(frozen=True, slots=True)
class _MixedPrecisionAttention:
    """Packed attention that casts its inputs under autocast, as scaled_dot_product_attention does."""

    segments: Segments

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        dtype = _autocast_dtype(q.device) or q.dtype
        with no_autocast(q):
            packed = PackedAttention(self.segments.to(q.device))
            return packed.attend(module, q.to(dtype), k.to(dtype), v.to(dtype), form)


def refuse(owner: str, reasons: Sequence[tuple[bool, str, str]]) -> None:
    """Raise ConfigError for the first (refused, what, remedy) that holds."""
    for bad, what, fix in reasons:
        if bad:
            raise ConfigError(f"{owner}: {what}", fix)


def common_refusals(args: TrainingArguments) -> list[tuple[bool, str, str]]:
    """Return the settings of every Trainer that no drop-in supports; see `refuse`."""
    untested = "it has not been tested with packed pairs"
    parallel = getattr(args, "parallelism_config", None)
    sizes = [getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")]
    return [
        (bool(args.deepspeed), f"deepspeed: {untested}", "use one device or DDP"),
        (bool(args.fsdp), f"fsdp: {untested}", "use one device or DDP; FSDP2 is in macpo's own trainer"),
        (any(size > 1 for size in sizes), "tensor, context and sequence parallelism", "use one device or DDP"),
        (bool(args.torch_compile), f"torch_compile: {untested}", "leave it off"),
        (bool(args.use_liger_kernel), f"use_liger_kernel: {untested}", "leave it off; head and loss are fused here"),
        (
            args.neftune_noise_alpha is not None,
            "neftune_noise_alpha: its noise depends on the padded length",
            "leave it None",
        ),
    ]


def check_model(owner: str, model: PreTrainedModel | PeftModel) -> None:
    """Raise ConfigError for dropout and router jitter: a shared prompt would draw once where padded rows draw twice."""
    for name, module in model.named_modules():
        rates = [getattr(module, "attention_dropout", 0.0), getattr(module, "dropout", 0.0)]
        if isinstance(module, nn.Dropout):
            rates.append(module.p)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ConfigError(f"{owner}: {name or type(module).__name__} has dropout", "set every dropout to 0")
        noise = [getattr(module, attribute, None) for attribute in _JITTER]
        if any(isinstance(width, float) and width > 0 for width in noise):
            problem = f"{owner}: {name or type(module).__name__} routes with noise in training"
            raise ConfigError(problem, "set the jitter of the model's config.json to 0, or use macpo's own trainer")
