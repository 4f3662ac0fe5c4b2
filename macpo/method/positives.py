"""Positive behaviour: which better answer an agent is shown."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from macpo.engine.config import ComputeSettings
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Example, Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.engine.models.compute import dtype_of
from macpo.engine.run.context import StageContext
from macpo.method.encoding import encode
from macpo.method.likelihoods import Likelihood, likelihoods
from macpo.method.negatives import answers_by_agent, pick_answer, random_name
from macpo.method.policies import agent_chat, load_policy

Candidate = dict[str, Any]  # {"by", "text", "finished", "sum_logp", "num_tokens", "perplexity"}


def score_candidates(compute: ComputeSettings, ctx: StageContext) -> None:
    """The stage's policy scores every agent's answer to every prompt, K answers behind one shared prefix.

    What it has written itself (`settings["own"]`) it need not score again in float32, where the tokens of the text are
    those that it drew. In 16 bits scoring and generation round differently, and reference log-probs come from here.
    """
    answers = answers_by_agent(ctx, "answers")
    items: list[tuple[Prompt, list[Response]]] = []
    for prompt in read_records(ctx.input("data") / "student.jsonl", Prompt):
        given = [answers[name][prompt.id] for name in sorted(answers) if prompt.id in answers[name]]
        if given:
            items.append((prompt, given))
    chat = agent_chat(ctx)
    groups, kept = encode(ctx, chat, [(prompt, [(r.text, r.finished) for r in given]) for prompt, given in items])
    own = ctx.settings.get("own") if dtype_of(compute) == torch.float32 else None
    given_by_group = [items[index][1] for index in kept]
    known = [
        [as_generated(r, ids) if r.agent == own else None for r, ids in zip(given, group.responses, strict=True)]
        for given, group in zip(given_by_group, groups, strict=True)
    ]
    scores = _with_known(compute, ctx, groups, known)
    if own is not None:
        ctx.note(scored_while_generated=sum(found is not None for group in known for found in group))
    rows = []
    for index, results in zip(kept, scores, strict=True):
        prompt, given = items[index]
        candidates = [
            {
                "by": response.agent,
                "text": response.text,
                "finished": response.finished,
                "sum_logp": result.sum_logp,
                "num_tokens": result.num_tokens,
                "perplexity": result.perplexity,
            }
            for response, result in zip(given, results, strict=True)
        ]
        rows.append({"prompt_id": prompt.id, "candidates": candidates})
    if ctx.world.is_main:
        write_jsonl(ctx.dir / "candidates.jsonl", rows)
    ctx.note(tokens=sum(len(g.prompt_ids) + sum(map(len, g.responses)) for g in groups))


def as_generated(response: Response, ids: list[int]) -> Likelihood | None:
    """An answer's likelihood under its author, as far as it is known: of these very token ids."""
    if response.sum_logp is None or response.ids_digest != ids_digest(ids):
        return None
    return Likelihood(response.sum_logp, len(ids))


def _with_known(
    compute: ComputeSettings, ctx: StageContext, groups: list[PrefixGroup], known: list[list[Likelihood | None]]
) -> list[list[Likelihood]]:
    """The likelihoods of all responses; only those that are not known are scored."""
    todo = [
        PrefixGroup(group.prompt_ids, [ids for ids, one in zip(group.responses, own, strict=True) if one is None])
        for group, own in zip(groups, known, strict=True)
    ]
    asked = [group for group in todo if group.responses]
    found: Iterator[Likelihood] = iter(())
    if asked:
        scores = likelihoods(load_policy(compute, ctx), asked, compute, ctx.world, ctx.stop_requested)
        found = chain.from_iterable(scores)
    return [[next(found) if one is None else one for one in own] for own in known]


def choose(candidates: list[Candidate], selection: str, seed: int, prompt_id: str) -> tuple[int, str]:
    """Index of the candidate to keep and the reason in words; ties go to the first agent by name."""
    perplexities = [candidate["perplexity"] for candidate in candidates]
    if selection == "random":
        name = random_name(seed, "positive", prompt_id, [candidate["by"] for candidate in candidates])
        return [candidate["by"] for candidate in candidates].index(name), f"random choice of {len(candidates)}"
    best = min(perplexities) if selection == "min-perplexity" else max(perplexities)
    word = "lowest" if selection == "min-perplexity" else "highest"
    return perplexities.index(best), f"{word} perplexity of {len(candidates)}: {best:.3f}"


def read_candidates(ctx: StageContext) -> dict[str, list[Candidate]]:
    """Scored answers by prompt id, from the input `scores`."""
    return {row["prompt_id"]: row["candidates"] for _, row in read_jsonl(ctx.input("scores") / "candidates.jsonl")}


def weak_labels(ctx: StageContext) -> None:
    """The student's first labels: one teacher answer a prompt, by `initial.weak_label`."""
    rule, seed = ctx.settings["weak_label"], ctx.settings["seed"]
    prompts = read_records(ctx.input("data") / "student.jsonl", Prompt)
    examples: list[Example] = []
    if rule == "min-perplexity":
        candidates = read_candidates(ctx)
        for prompt in prompts:
            if prompt.id in candidates:
                index, _ = choose(candidates[prompt.id], rule, seed, prompt.id)
                kept = candidates[prompt.id][index]
                examples.append(Example(prompt, kept["text"], kept["finished"], kept["by"]))
    else:
        answers = answers_by_agent(ctx, "answers")
        for prompt in prompts:
            label = pick_answer(seed, "weak-label", prompt.id, answers)
            if label:
                examples.append(Example(prompt, label.text, label.finished, label.agent))
    write_records(ctx.dir / "examples.jsonl", examples)
    ctx.note(examples=len(examples))
