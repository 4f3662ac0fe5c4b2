"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from macpo.engine.config import (
    ComputeSettings,
    FullSettings,
    LoraSettings,
    PreferenceSettings,
    Tuning,
)
from macpo.engine.data.chat import load_tokenizer
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.distributed.agree import on_main
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.models.compute import device_of, dtype_of
from macpo.engine.models.loading import local_folder
from macpo.engine.models.policy import PolicyModule, PolicyRef
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import CACHE
from macpo.engine.training.reference import cached, reference_key, weighted
from macpo.method.likelihoods import shared_parts
from macpo.method.policies import agent_chat, base_path, folder_ref, load_policy, policy_ref

TUNING: TypeAdapter[Tuning] = TypeAdapter(Tuning)


def reference_logps(
    compute: ComputeSettings,
    ctx: StageContext,
    groups: Sequence[PrefixGroup],
    settings: PreferenceSettings,
    policy: Callable[[], PolicyModule],
    known: Sequence[float | None] | None = None,
) -> Tensor | None:
    """Summed log-probs [num_groups, 2] float32 of (chosen, rejected) under the reference; None for losses without one.

    Handed over by the input `reference`, else from the cache, else computed. `policy` gives that about to be trained.
    `known`: chosen log-probs that the scoring of the positives has left; the scorer was that very policy, so only the
    rejected answer is computed. They do not serve where the reference is another one or tokens have weights (ld_alpha).
    """
    if not settings.has_reference:
        return None
    if "reference" in ctx.inputs:
        return weighted(read_reference(ctx, "train", len(groups)), settings.ld_alpha).float()
    own = settings.reference == "policy" and settings.reference_model is None
    if known is None or not own or settings.ld_alpha is not None:
        known = [None] * len(groups)
    jobs = [
        PrefixGroup(group.prompt_ids, group.responses if value is None else group.responses[1:])
        for group, value in zip(groups, known, strict=True)
    ]
    parts = reference_parts(compute, ctx, jobs, settings, policy if own else None)
    sums = iter(weighted(parts, settings.ld_alpha).tolist())
    rows = [[next(sums) if value is None else value, next(sums)] for value in known]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)


def reference_parts(
    compute: ComputeSettings,
    ctx: StageContext,
    groups: Sequence[PrefixGroup],
    settings: PreferenceSettings,
    policy: Callable[[], PolicyModule] | None = None,
) -> Tensor:
    """`shared_parts` under the settings' reference, from the cache or computed; `policy` gives it if it is that one."""
    tuning: Tuning | None = TUNING.validate_python(ctx.settings["tuning"])
    ref = policy_ref(ctx)
    if settings.reference_model is not None:
        trust = ctx.settings["agent"]["trust_remote_code"]
        ref, tuning = folder_ref(ctx, local_folder(settings.reference_model, trust_remote_code=trust)), None
        if ref.adapter is None:
            _check_same_tokens(ctx, settings.reference_model)
    elif settings.reference == "adapter-off":
        ref = PolicyRef(base_path(ctx))
    quantization = tuning.quantization if isinstance(tuning, LoraSettings) else "none"
    if quantization == "none" and not isinstance(tuning, FullSettings):
        tuning = None  # a fresh adapter adds nothing, another one is loaded frozen: the numbers of training either way
    numerics = f"{device_of(compute).type} {dtype_of(compute)} {quantization}"
    if isinstance(tuning, FullSettings) and ref.adapter is not None:
        numerics += " merged"
    digest = agent_chat(ctx).digest
    key = on_main(ctx.world, lambda: reference_key(ref, groups, tokenizer=digest, numerics=numerics))
    folder = Path(compute.cache).expanduser() if compute.cache is not None else ctx.dir.parent / CACHE

    def scored() -> Tensor:
        model = policy() if policy is not None else load_policy(compute, ctx, tuning, ref)
        return shared_parts(model, groups, compute, ctx.world, ctx.stop_requested)

    return cached(folder, key, groups, scored, world=ctx.world, log=ctx.log)


def _check_same_tokens(ctx: StageContext, path: str) -> None:
    """Log-probs of token ids mean nothing under a model that reads other tokens."""
    vocabulary = load_tokenizer(path, trust_remote_code=ctx.settings["agent"]["trust_remote_code"]).get_vocab()
    if vocabulary != agent_chat(ctx).tokenizer.get_vocab():
        raise ConfigError(
            f"{path!r} has another vocabulary than the policy",
            "name a model with the same tokenizer",
            field="reference_model",
        )


def read_reference(ctx: StageContext, name: str, num_groups: int) -> Tensor:
    """What the reference stage wrote about a set of pairs: [num_groups, 2, 2] float64, `shared_sums` by pair."""
    path = ctx.input("reference") / f"{name}.safetensors"
    parts = load_file(path)["parts"]
    if list(parts.shape) != [num_groups, 2, 2]:
        raise DataError(
            f"reference log-probs of {parts.shape[0]} pairs, {num_groups} are there",
            "run with --from reference",
            file=str(path),
        )
    return parts
