"""An agent's policies: where they lie, how they answer and how they learn. Each public function is a stage.

A policy is a folder `policy/` of the stage that made it: a peft adapter, or a whole Hugging Face model.
What a stage depends on stands in its settings and inputs; `ComputeSettings` only says where it runs.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from macpo.engine.chat import Chat, load_tokenizer
from macpo.engine.compute import device_of, dtype_of, model_pool
from macpo.engine.config import (
    ComputeSettings,
    FullSettings,
    LoraSettings,
    OptimSettings,
    PreferenceSettings,
    SamplingSettings,
    Tuning,
)
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.execute import StageContext
from macpo.engine.generation import Generator, SamplingParams, generate_waves
from macpo.engine.loading import local_folder
from macpo.engine.model import PolicyModule, PolicyRef, check_vocab, save_policy
from macpo.engine.objectives import preference, sft, shared_sums, weighted
from macpo.engine.pack import PrefixGroup
from macpo.engine.parallel import World, parallelize, spreads
from macpo.engine.records import Example, Message, Pair, Prompt, Response, read_records, write_records
from macpo.engine.reference import cached, reference_key
from macpo.engine.run_folder import CACHE
from macpo.engine.scoring import ResponseScore, score
from macpo.engine.trackers import Trackers
from macpo.engine.trainer import train

TUNING: TypeAdapter[Tuning] = TypeAdapter(Tuning)


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
    return _folder_ref(ctx, folder)


def _folder_ref(ctx: StageContext, folder: Path) -> PolicyRef:
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


def encode(
    ctx: StageContext, chat: Chat, items: Sequence[tuple[Prompt, Sequence[tuple[str, bool]]]]
) -> tuple[list[PrefixGroup], list[int]]:
    """(prompt, answers) -> shared-prefix groups and the indices of the items that have one.

    A prompt keeps the room `max_prompt_tokens` whatever its answers are, so that an answer is scored and
    trained after the very same prompt tokens. Raises DataError (3) if no item is left.
    """
    agent = ctx.settings["agent"]
    groups, kept = [], []
    for index, (prompt, answers) in enumerate(items):
        group = chat.group(
            prompt.messages,
            answers,
            max_tokens=agent["context_tokens"],
            max_prompt_tokens=agent["max_prompt_tokens"],
            long_prompt=agent["long_prompt"],
        )
        if group is not None:
            groups.append(group)
            kept.append(index)
    if not groups:
        raise DataError(
            f"none of {len(items)} prompts is left: each is longer than the {agent['max_prompt_tokens']} tokens that "
            f"context_tokens ({agent['context_tokens']}) leaves it",
            "raise context_tokens, or set data.long_prompt to truncate",
            field=ctx.name,
        )
    return groups, kept


def load_policy(
    compute: ComputeSettings,
    ctx: StageContext,
    tuning: Tuning | None = None,
    ref: PolicyRef | None = None,
    *,
    whole: bool = False,
) -> PolicyModule:
    """The stage's policy (or another one, `ref`), for use (tuning None) or to train.

    Spread over the ranks as `compute.parallel` says where it trains, or does not fit on one rank and need not be
    `whole`. Raises ConfigError where its embedding lacks a row for a token.
    """
    pool = model_pool(compute, ctx.settings["agent"]["trust_remote_code"])
    ref = ref or policy_ref(ctx)
    needed = tuning is not None or not pool.fits(ref.base)
    spread = needed and not whole and spreads(compute.parallel, ctx.world)
    policy = pool.policy(ref, tuning, seed=ctx.settings.get("seed", 0) if tuning is not None else 0, spread=spread)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    return parallelize(policy, compute.parallel, ctx.world) if spread or tuning is not None else policy


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


def encode_pairs(ctx: StageContext, pairs: Sequence[Pair]) -> tuple[list[PrefixGroup], list[int]]:
    """Groups of prompt + [chosen, rejected], and the indices of the pairs that have one."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    return encode(ctx, agent_chat(ctx), items)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely an answer is under a policy: summed log-prob (nats) over its tokens."""

    sum_logp: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean token NLL of the answer, EOS included where it has one."""
        return math.exp(min(-self.sum_logp / self.num_tokens, 700.0))


def likelihoods(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[Likelihood]]:
    """Score every response of every group; all ranks get all results. Raises Stopped after `should_stop`."""
    scores = _scored(policy, groups, compute, world, should_stop, lambda g: [(r.sum_logp, r.num_tokens) for r in g])
    return [[Likelihood(sum_logp, num_tokens) for sum_logp, num_tokens in group] for group in scores]


def shared_parts(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """`objectives.shared_sums` of every response of every group: [R, 2] float64; all ranks get all results."""
    scores = _scored(policy, groups, compute, world, should_stop, lambda g: shared_sums([r.token_logps for r in g]))
    return torch.tensor([part for group in scores for part in group], dtype=torch.float64).reshape(-1, 2)


def _scored(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    compute: ComputeSettings,
    world: World,
    should_stop: Callable[[], bool] | None,
    kept: Callable[[list[ResponseScore]], Any],
) -> list[Any]:
    """What is kept of each group's scores, the groups dealt out to the ranks; all ranks get all results."""
    mine = score(policy, groups, max_tokens=compute.score_tokens, world=world, should_stop=should_stop)
    found = world.gather([kept(scores) if scores else None for scores in mine])
    return [next(part for part in parts if part is not None) for parts in zip(*found, strict=True)]


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
        ref, tuning = _folder_ref(ctx, local_folder(settings.reference_model)), None
        _check_same_tokens(ctx, settings.reference_model)
    elif settings.reference == "adapter-off":
        ref = PolicyRef(base_path(ctx))
    quantization = tuning.quantization if isinstance(tuning, LoraSettings) else "none"
    if quantization == "none" and not isinstance(tuning, FullSettings):
        tuning = None  # a fresh adapter adds nothing, another one is loaded frozen: the numbers of training either way
    numerics = f"{device_of(compute).type} {dtype_of(compute)} {quantization}"
    if isinstance(tuning, FullSettings) and ref.adapter is not None:
        numerics += " merged"
    key = reference_key(ref, groups, tokenizer=agent_chat(ctx).digest, numerics=numerics)
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


def limited_prompt(ctx: StageContext, chat: Chat, messages: Sequence[Message]) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped."""
    agent = ctx.settings["agent"]
    return chat.limited_prompt_ids(messages, agent["max_prompt_tokens"], long_prompt=agent["long_prompt"])


def generate_answers(
    compute: ComputeSettings, ctx: StageContext, prompts: Sequence[Prompt]
) -> tuple[list[Response], dict[str, int]]:
    """One answer a prompt by the stage's policy, in fixed waves below the stage's folder; and counts."""
    chat = agent_chat(ctx)
    agent = ctx.settings["agent"]["name"]
    requests = []
    for prompt in sorted({p.id: p for p in prompts}.values(), key=lambda p: p.id):
        ids = limited_prompt(ctx, chat, prompt.messages)
        if ids is not None:
            requests.append((prompt.id, ids))
    generator = Generator(load_policy(compute, ctx, whole=True), chat.tokenizer, max_batch=compute.generation_batch)
    sampling = SamplingSettings.model_validate(ctx.settings["sampling"])
    params = SamplingParams(
        **sampling.model_dump(), seed=ctx.settings["seed"], stop_token_ids=tuple(sorted(chat.stop_ids))
    )
    rows = generate_waves(
        generator,
        requests,
        params,
        folder=ctx.dir,
        wave_requests=compute.wave_requests,
        purpose=f"{agent}/{ctx.settings['policy_name']}",
        decode=chat.text,
        world=ctx.world,
        should_stop=ctx.stop_requested,
        progress=ctx.name,
    )
    responses = [
        Response(row["id"], agent, row["text"], row["finish_reason"] == "stop", row["num_tokens"], row["attempt"])
        for row in rows
        if row["text"]
    ]
    counts = {"dropped_long_prompt": len({p.id for p in prompts}) - len(requests), "empty": len(rows) - len(responses)}
    counts["resampled"] = sum(row["attempt"] > 0 for row in rows)
    ctx.note(tokens=sum(row["num_tokens"] for row in rows), **counts)
    return responses, counts


def answer(compute: ComputeSettings, ctx: StageContext) -> None:
    """The stage's policy answers every prompt of the student half."""
    prompts = read_records(ctx.input("data") / "student.jsonl", Prompt)
    responses, _ = generate_answers(compute, ctx, prompts)
    if ctx.world.is_main:
        write_records(ctx.dir / "responses.jsonl", responses)
        shutil.rmtree(ctx.dir / "waves")


def read_answers(folder: Path) -> dict[str, Response]:
    """The answers of one stage by prompt id."""
    return {response.prompt_id: response for response in read_records(folder / "responses.jsonl", Response)}
