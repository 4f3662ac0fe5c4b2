"""How a policy learns: SFT or preference training from where it stands, and what it is held to meanwhile."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence

from macpo.engine.config import (
    ComputeSettings,
    OptimSettings,
    PreferenceSettings,
)
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Example, Pair, read_records
from macpo.engine.models.saving import save_policy
from macpo.engine.run.context import StageContext
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.trackers import Trackers
from macpo.engine.training.trainer import train
from macpo.method.encoding import encode, encode_pairs
from macpo.method.policies import agent_chat, load_policy
from macpo.method.reference import TUNING, reference_logps


def imitate(compute: ComputeSettings, ctx: StageContext) -> None:
    """SFT on one side of human pairs, or on weak labels: the initial policies, and the ceiling."""
    path, side = ctx.input("examples") / ctx.settings["file"], ctx.settings["side"]
    if side == "answer":
        examples = read_records(path, Example)
    else:
        examples = [Example(pair.prompt, getattr(pair, side)) for pair in read_records(path, Pair)]
    chat = agent_chat(ctx)
    groups, kept = encode(ctx, chat, [(e.prompt, [(e.answer, e.finished)]) for e in examples])
    ctx.note(examples=len(groups), dropped_long_prompt=len(examples) - len(groups))
    ids = [examples[i].prompt.id for i in kept]
    _learn(compute, ctx, groups, ids, OptimSettings.model_validate(ctx.settings["optim"]))


def prefer(compute: ComputeSettings, ctx: StageContext) -> None:
    """Preference training on pairs, from the stage's policy, which is the frozen reference too unless the settings say
    otherwise."""
    pairs = read_records(ctx.input("pairs") / ctx.settings.get("file", "pairs.jsonl"), Pair)
    groups, kept = encode_pairs(ctx, pairs)
    ctx.note(pairs=len(groups), dropped_long_prompt=len(pairs) - len(groups))
    known = [pairs[i].ref_chosen_logp for i in kept]
    ids = [pairs[i].prompt.id for i in kept]
    _learn(compute, ctx, groups, ids, PreferenceSettings.model_validate(ctx.settings["optim"]), known)


def _learn(
    compute: ComputeSettings,
    ctx: StageContext,
    groups: list[PrefixGroup],
    ids: list[str],
    optim: OptimSettings,
    known: Sequence[float | None] | None = None,
) -> None:
    """Train a copy of the stage's policy on `groups` and save it as `policy/`."""
    tuning = TUNING.validate_python(ctx.settings["tuning"])
    policy = functools.cache(lambda: load_policy(compute, ctx, tuning))  # a separate reference comes and goes before it
    objective = sft()
    if isinstance(optim, PreferenceSettings):
        objective = preference(optim, reference_logps(compute, ctx, groups, optim, policy, known))
    result = train(
        policy(),
        groups,
        objective,
        optim,
        seed=ctx.settings["seed"],
        workdir=ctx.dir,
        ids=ids,
        world=ctx.world,
        should_stop=ctx.stop_requested,
        progress=ctx.name,
        trackers=Trackers(compute.trackers, ctx.name, ctx.dir.parent / "trackers"),
    )
    base_name = str(ctx.settings["agent"]["model"])
    save_policy(policy(), ctx.dir / "policy", base_name=base_name, tokenizer=agent_chat(ctx).tokenizer)
    if ctx.world.is_main:
        shutil.rmtree(ctx.dir / "checkpoint", ignore_errors=True)
    ctx.note(tokens=result.tokens, steps=result.steps)
