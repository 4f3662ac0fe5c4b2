"""An agent's policies: where they lie, how they answer and how they learn. Each public function is a stage.

A policy is a folder `policy/` of the stage that made it: a peft adapter, or a whole Hugging Face model.
What a stage depends on stands in its settings and inputs; `ComputeSettings` only says where it runs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import TypeAdapter

from macpo.engine.chat import Chat, load_tokenizer
from macpo.engine.compute import model_pool
from macpo.engine.config import ComputeSettings, OptimSettings, PreferenceSettings, SamplingSettings, Tuning
from macpo.engine.errors import DataError
from macpo.engine.execute import StageContext
from macpo.engine.generation import Generator, SamplingParams, generate_waves
from macpo.engine.model import PolicyModule, PolicyRef, check_vocab, save_policy
from macpo.engine.objectives import preference, sft
from macpo.engine.pack import PrefixGroup
from macpo.engine.parallel import World
from macpo.engine.records import Example, Message, Pair, Prompt, Response, read_records, write_records
from macpo.engine.scoring import score
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
    if (folder / "adapter_config.json").exists():
        return PolicyRef(base_path(ctx), str(folder))
    return PolicyRef(str(folder))


@lru_cache(maxsize=16)
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


def load_policy(compute: ComputeSettings, ctx: StageContext, tuning: Tuning | None = None) -> PolicyModule:
    """The stage's policy, for use (tuning None) or to train; its embedding has a row for every token."""
    pool = model_pool(compute, ctx.settings["agent"]["trust_remote_code"])
    policy = pool.policy(policy_ref(ctx), tuning, seed=ctx.settings["seed"] if tuning is not None else 0)
    check_vocab(policy.base, agent_chat(ctx).tokenizer)
    return policy


def _learn(
    compute: ComputeSettings,
    ctx: StageContext,
    groups: list[PrefixGroup],
    ids: list[str],
    optim: OptimSettings,
    ref_chosen: Sequence[float | None] | None = None,
) -> None:
    """Train a copy of the stage's policy on `groups` and save it as `policy/`."""
    policy = load_policy(compute, ctx, TUNING.validate_python(ctx.settings["tuning"]))
    objective = sft()
    if isinstance(optim, PreferenceSettings):
        assert ref_chosen is not None
        objective = preference(optim, reference_logps(policy, groups, ref_chosen, compute, ctx.world))
    result = train(
        policy,
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
    if ctx.world.is_main:
        base_name = str(ctx.settings["agent"]["model"])
        save_policy(policy, ctx.dir / "policy", base_name=base_name, tokenizer=agent_chat(ctx).tokenizer)
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
    """DPO on `pairs.jsonl` from the previous policy, which is also the frozen reference."""
    pairs = read_records(ctx.input("pairs") / "pairs.jsonl", Pair)
    chat = agent_chat(ctx)
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    groups, kept = encode(ctx, chat, items)
    ctx.note(pairs=len(groups), dropped_long_prompt=len(pairs) - len(groups))
    known = [pairs[i].ref_chosen_logp for i in kept]
    ids = [pairs[i].prompt.id for i in kept]
    _learn(compute, ctx, groups, ids, PreferenceSettings.model_validate(ctx.settings["optim"]), known)


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
    policy: PolicyModule, groups: Sequence[PrefixGroup], compute: ComputeSettings, world: World
) -> list[list[Likelihood]]:
    """Score every response of every group, the groups dealt out to the ranks; all ranks get all results."""
    mine = score(policy, groups[world.rank :: world.size], max_tokens=compute.score_tokens)
    parts = world.gather([[[r.sum_logp, r.num_tokens] for r in responses] for responses in mine])
    return [
        [Likelihood(sum_logp, num_tokens) for sum_logp, num_tokens in parts[i % world.size][i // world.size]]
        for i in range(len(groups))
    ]


def reference_logps(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    ref_chosen: Sequence[float | None],
    compute: ComputeSettings,
    world: World,
) -> torch.Tensor:
    """Summed log-probs [num_groups, 2] float32 of (chosen, rejected) under the policy about to be trained.

    Where the scoring that chose the positive has left the chosen answer's log-prob, only the rejected one
    is computed: the scorer was this very policy.
    """
    jobs = [
        PrefixGroup(group.prompt_ids, group.responses if value is None else group.responses[1:])
        for group, value in zip(groups, ref_chosen, strict=True)
    ]
    found = likelihoods(policy, jobs, compute, world)
    rows = [
        [scores[0].sum_logp if value is None else value, scores[-1].sum_logp]
        for value, scores in zip(ref_chosen, found, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)


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
    generator = Generator(load_policy(compute, ctx), chat.tokenizer, max_batch=compute.generation_batch)
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
