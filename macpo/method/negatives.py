"""Negative behaviour: which worse answer an agent is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from macpo.engine.data.records import Example, Prompt, Response, read_records, write_records
from macpo.engine.run.context import StageContext
from macpo.method.answers import read_answers


def random_name(seed: int, purpose: str, prompt_id: str, names: Sequence[str]) -> str:
    """A uniformly drawn name, a function of seed, purpose and prompt alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{prompt_id}".encode()).digest()
    return sorted(names)[int.from_bytes(digest[:8], "big") % len(names)]


def pick_answer(seed: int, purpose: str, prompt_id: str, answers: dict[str, dict[str, Response]]) -> Response | None:
    """The answer of a seeded random agent among those that answered this prompt; None if none did."""
    names = [name for name, given in answers.items() if prompt_id in given]
    return answers[random_name(seed, purpose, prompt_id, names)][prompt_id] if names else None


def answers_by_agent(ctx: StageContext, prefix: str) -> dict[str, dict[str, Response]]:
    """Answers by agent and prompt id, from the inputs called `prefix:<agent>`."""
    return {
        alias.removeprefix(f"{prefix}:"): read_answers(ctx.input(alias))
        for alias in ctx.inputs
        if alias.startswith(f"{prefix}:")
    }


def weak_negative_labels(ctx: StageContext) -> None:
    """One weak negative label a prompt for the student's negative policy, from a seeded random teacher.

    Not by perplexity: the most likely negative answer is too often a good one.
    """
    answers = answers_by_agent(ctx, "answers")
    picked = (
        (prompt, pick_answer(ctx.settings["seed"], "weak-negative", prompt.id, answers))
        for prompt in read_records(ctx.input("data") / "student.jsonl", Prompt)
    )
    examples = [Example(prompt, label.text, label.finished, label.agent) for prompt, label in picked if label]
    write_records(ctx.dir / "examples.jsonl", examples)
    ctx.note(examples=len(examples))
