"""Positive behaviour: which better answer an agent is shown."""

from __future__ import annotations

from typing import Any

from macpo.agents import agent_chat, encode, likelihoods, load_policy
from macpo.engine.config import ComputeSettings
from macpo.engine.execute import StageContext
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.engine.records import Example, Prompt, Response, read_records, write_records
from macpo.negatives import answers_by_agent, pick_answer, random_name

Candidate = dict[str, Any]  # {"by", "text", "finished", "sum_logp", "num_tokens", "perplexity"}


def score_candidates(compute: ComputeSettings, ctx: StageContext) -> None:
    """The stage's policy scores every agent's answer to every prompt, K answers behind one shared prefix."""
    answers = answers_by_agent(ctx, "answers")
    items: list[tuple[Prompt, list[Response]]] = []
    for prompt in read_records(ctx.input("data") / "student.jsonl", Prompt):
        given = [answers[name][prompt.id] for name in sorted(answers) if prompt.id in answers[name]]
        if given:
            items.append((prompt, given))
    chat = agent_chat(ctx)
    groups, kept = encode(ctx, chat, [(prompt, [(r.text, r.finished) for r in given]) for prompt, given in items])
    scores = likelihoods(load_policy(compute, ctx), groups, compute, ctx.world, ctx.stop_requested)
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
