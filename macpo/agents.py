"""An agent's policies: where they lie, what they read, how likely they find an answer, and how they answer.

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
from torch import Tensor

from macpo.engine.config import (
    ComputeSettings,
    SamplingSettings,
    ServedSettings,
    Tuning,
)
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Message, Pair, Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.distributed.world import World
from macpo.engine.errors import DataError
from macpo.engine.generation import Generator, SamplingParams, ServedGenerator, generate_waves
from macpo.engine.generation.served import OPTIONS
from macpo.engine.generation.split_model import split_policy, team_size
from macpo.engine.models.compute import model_pool
from macpo.engine.models.loading import check_vocab
from macpo.engine.models.parallelize import parallelize, spreads
from macpo.engine.models.policy import PolicyModule, PolicyRef
from macpo.engine.run.context import StageContext
from macpo.engine.scoring import ResponseScore, score
from macpo.engine.training.reference import shared_sums


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


def encode_pairs(ctx: StageContext, pairs: Sequence[Pair]) -> tuple[list[PrefixGroup], list[int]]:
    """Groups of prompt + [chosen, rejected], and the indices of the pairs that have one."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    return encode(ctx, agent_chat(ctx), items)


def load_policy(
    compute: ComputeSettings, ctx: StageContext, tuning: Tuning | None = None, ref: PolicyRef | None = None
) -> PolicyModule:
    """The stage's policy (or another one, `ref`), to score with (tuning None) or to train.

    Spread over the ranks as `compute.parallel` says where it trains, or does not fit on one rank. Raises ConfigError
    where its embedding lacks a row for a token.
    """
    pool = model_pool(compute, ctx.settings["agent"]["trust_remote_code"])
    ref = ref or policy_ref(ctx)
    spread = (tuning is not None or not pool.fits(ref.base)) and spreads(compute.parallel, ctx.world)
    policy = pool.policy(ref, tuning, seed=ctx.settings.get("seed", 0) if tuning is not None else 0, spread=spread)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    return parallelize(policy, compute.parallel, ctx.world) if spread or tuning is not None else policy


def load_writer(compute: ComputeSettings, ctx: StageContext) -> PolicyModule:
    """The stage's policy, to generate with: whole where a rank can hold it, else split over the fewest that can.

    Raises ConfigError where its embedding lacks a row for a token, ResourceError where no ranks can hold it.
    """
    pool = model_pool(compute, ctx.settings["agent"]["trust_remote_code"])
    ref = policy_ref(ctx)
    shared = ctx.world.size > 1 and not pool.fits(ref.base)
    policy = pool.policy(ref, spread=shared)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    if not shared:
        return policy
    ranks = team_size(policy, lambda ranks: pool.fits(ref.base, ranks), ctx.world)
    pool.make_room(ref.base, ranks)
    return split_policy(policy, ctx.world, ranks)


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


def limited_prompt(ctx: StageContext, chat: Chat, messages: Sequence[Message]) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped."""
    agent = ctx.settings["agent"]
    return chat.limited_prompt_ids(messages, agent["max_prompt_tokens"], long_prompt=agent["long_prompt"])


def generate_answers(
    compute: ComputeSettings, ctx: StageContext, prompts: Sequence[Prompt], served: ServedSettings | None = None
) -> tuple[list[Response], dict[str, int]]:
    """One answer a prompt by the stage's policy, in fixed waves below the stage's folder; and counts.

    `served`: the server that generates, for an agent whose settings name the model there.
    """
    agent = ctx.settings["agent"]
    chat = agent_chat(ctx) if agent["model"] is not None else None
    distinct = sorted({p.id: p for p in prompts}.values(), key=lambda p: p.id)
    requests = [(prompt.id, ids) for prompt in distinct if (ids := _asked(ctx, chat, prompt, served)) is not None]
    generator: Generator | ServedGenerator
    if served is None:
        assert chat is not None
        generator = Generator(load_writer(compute, ctx), chat.tokenizer, max_batch=compute.generation_batch)
    else:
        generator = ServedGenerator(served, ctx.settings["served"]["model"], chat and chat.tokenizer)
    sampling = SamplingSettings.model_validate(ctx.settings["sampling"])
    stops = chat is not None and (served is None or "stop_token_ids" in OPTIONS[served.server])
    params = SamplingParams(
        **sampling.model_dump(),
        seed=ctx.settings["seed"],
        stop_token_ids=tuple(sorted(chat.stop_ids)) if chat is not None and stops else (),
    )
    rows = generate_waves(
        generator,
        requests,
        params,
        messages={p.id: p.messages for p in distinct} if served is not None and served.api == "chat" else None,
        folder=ctx.dir,
        wave_requests=compute.wave_requests,
        purpose=f"{agent['name']}/{ctx.settings['policy_name']}",
        decode=chat.text if chat is not None and served is None else None,
        world=ctx.world,
        should_stop=ctx.stop_requested,
        progress=ctx.name,
    )
    responses = [
        Response(
            row["id"],
            agent["name"],
            text,
            row["finish_reason"] == "stop",
            row["num_tokens"],
            row["attempt"],
            *_carried(row),
        )
        for row in rows
        if (text := row["text"].strip())
    ]
    counts = {"dropped_long_prompt": len(distinct) - len(requests), "empty": len(rows) - len(responses)}
    counts["resampled"] = sum(row["attempt"] > 0 for row in rows)
    ctx.note(tokens=sum(row["num_tokens"] for row in rows), **counts)
    return responses, counts


def _carried(row: dict[str, Any]) -> tuple[float | None, str | None]:
    """`sum_logp` and `ids_digest` of an answer; none where a server or a stop text ended it."""
    ended = row["end_token"] is not None
    if row["sum_logp"] is None or (row["finish_reason"] == "stop" and not ended):
        return None, None
    if not ended:
        return row["sum_logp"], ids_digest(row["token_ids"])
    return row["sum_logp"] + row["end_logp"], ids_digest([*row["token_ids"], row["end_token"]])


def _asked(ctx: StageContext, chat: Chat | None, prompt: Prompt, served: ServedSettings | None) -> list[int] | None:
    """The prompt's token ids; none where only the server's template is known; None where the prompt is dropped.

    Raises DataError for a dialogue that would have to be cut: a server takes it whole or not at all.
    """
    if chat is None:
        return []
    ids = limited_prompt(ctx, chat, prompt.messages)
    if served is not None and served.api == "chat" and ids is not None and ids != chat.prompt_ids(prompt.messages):
        raise DataError(
            f"prompt {prompt.id} is longer than {ctx.settings['agent']['max_prompt_tokens']} tokens, and a dialogue "
            "cannot be cut",
            "set data.long_prompt to drop, or use served.api: completions",
            field=ctx.name,
        )
    return ids


def answer(compute: ComputeSettings, ctx: StageContext, served: ServedSettings | None = None) -> None:
    """The stage's policy answers every prompt of the student half."""
    prompts = read_records(ctx.input("data") / "student.jsonl", Prompt)
    responses, _ = generate_answers(compute, ctx, prompts, served)
    if ctx.world.is_main:
        write_records(ctx.dir / "responses.jsonl", responses)
        shutil.rmtree(ctx.dir / "waves")


def read_answers(folder: Path) -> dict[str, Response]:
    """The answers of one stage by prompt id."""
    return {response.prompt_id: response for response in read_records(folder / "responses.jsonl", Response)}
