"""TODO."""

from __future__ import annotations

import functools
from pathlib import Path

from macpo.engine.config import (
    ComputeSettings,
    Tuning,
)
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.generation.split_model import split_policy, team_size
from macpo.engine.models.compute import model_cache
from macpo.engine.models.loading import check_vocab
from macpo.engine.models.parallelize import parallelize, spreads
from macpo.engine.models.policy import PolicyModule, PolicyRef
from macpo.engine.run.context import StageContext


def base_path(ctx: StageContext) -> str:
    """The agent's base model: made by an earlier stage, or named in the recipe."""
    return str(ctx.input("base") / "model") if "base" in ctx.inputs else str(ctx.settings["agent"]["model"])


def policy_ref(ctx: StageContext) -> PolicyRef:
    """The policy a stage starts from: an earlier stage's, a ready one of the recipe's, or the bare base."""
    if "policy" in ctx.inputs:
        folder = ctx.input("policy") / "policy"
    elif ctx.settings.get("ready"):
        folder = Path(ctx.settings["ready"])
    else:
        return PolicyRef(base_path(ctx))
    return folder_ref(ctx, folder)


def folder_ref(ctx: StageContext, folder: Path) -> PolicyRef:
    """A whole model, or an adapter of the agent's base."""
    adapter = (folder / "adapter_config.json").exists()
    return PolicyRef(base_path(ctx), str(folder)) if adapter else PolicyRef(str(folder))


@functools.lru_cache(maxsize=16)
def _chat(path: str, template: str, special_text: str, eos_token: str | None, trust: bool) -> Chat:
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    return Chat(tokenizer, template, special_text=special_text, eos_token=eos_token)


def agent_chat(ctx: StageContext) -> Chat:
    """The agent's tokenizer and template."""
    agent = ctx.settings["agent"]
    path = base_path(ctx)
    return _chat(path, agent["template"], agent["special_text"], agent["eos_token"], agent["trust_remote_code"])


def load_policy(
    compute: ComputeSettings, ctx: StageContext, tuning: Tuning | None = None, ref: PolicyRef | None = None
) -> PolicyModule:
    """The stage's policy (or another one, `ref`), to score with (tuning None) or to train.

    Spread over the ranks as `compute.parallel` says where it trains, or does not fit on one rank. Raises ConfigError
    where its embedding lacks a row for a token.
    """
    pool = model_cache(compute, ctx.settings["agent"]["trust_remote_code"])
    ref = ref or policy_ref(ctx)
    spread = (tuning is not None or not pool.fits(ref.base)) and spreads(compute.parallel, ctx.world)
    policy = pool.policy(ref, tuning, seed=ctx.settings.get("seed", 0) if tuning is not None else 0, spread=spread)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    return parallelize(policy, compute.parallel, ctx.world) if spread or tuning is not None else policy


def load_writer(compute: ComputeSettings, ctx: StageContext) -> PolicyModule:
    """The stage's policy, to generate with: whole where a rank can hold it, else split over the fewest that can.

    Raises ConfigError where its embedding lacks a row for a token, ResourceError where no ranks can hold it.
    """
    pool = model_cache(compute, ctx.settings["agent"]["trust_remote_code"])
    ref = policy_ref(ctx)
    shared = ctx.world.size > 1 and not pool.fits(ref.base)
    policy = pool.policy(ref, spread=shared)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    if not shared:
        return policy
    ranks = team_size(policy, lambda ranks: pool.fits(ref.base, ranks), ctx.world)
    pool.make_room(ref.base, ranks)
    return split_policy(policy, ctx.world, ranks)
