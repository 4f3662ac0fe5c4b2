"""Negative behaviour: which worse response an agent is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from macpo.engine.data.records import Example, Prompt, Response, read_records, write_records
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import MethodStage
from macpo.method.responses import read_responses

Responses = dict[str, dict[str, Response]]  # agent -> prompt id -> its response


def random_name(seed: int, purpose: str, prompt_id: str, names: Sequence[str]) -> str:
    """A uniformly drawn name, a function of seed, purpose and prompt alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{prompt_id}".encode()).digest()
    return sorted(names)[int.from_bytes(digest[:8], "big") % len(names)]


def pick_response(seed: int, purpose: str, prompt_id: str, responses: Responses) -> Response | None:
    """The response of a seeded random agent among those that answered this prompt; None if none did."""
    names = [name for name, given in responses.items() if prompt_id in given]
    return responses[random_name(seed, purpose, prompt_id, names)][prompt_id] if names else None


def responses_by_agent(ctx: StageContext, stages: Mapping[str, str]) -> Responses:
    """Responses by agent and prompt id; `stages`: agent -> the stage in which it answered."""
    return {agent: read_responses(ctx.input(stage)) for agent, stage in stages.items()}


class WeakNegativeInputs(StageInputs):
    data: str
    answers: dict[str, str]
    """Teacher -> the stage in which its negative policy answered."""


class WeakNegativeLabels(MethodStage):
    """One weak negative label a prompt for the student's negative policy, from a seeded random teacher.

    Not by perplexity: the most likely negative response is too often a good one.
    """

    name = "weak_negative_labels"
    doing = "picks weak negatives"
    seed: int
    inputs: WeakNegativeInputs

    def run(self, ctx: StageContext) -> None:
        responses = responses_by_agent(ctx, self.inputs.answers)
        picked = (
            (prompt, pick_response(self.seed, "weak-negative", prompt.id, responses))
            for prompt in read_records(ctx.input(self.inputs.data) / "student.jsonl", Prompt)
        )
        examples = [Example(prompt, label.text, label.finished, label.agent) for prompt, label in picked if label]
        write_records(ctx.dir / "examples.jsonl", examples)
        ctx.note(examples=len(examples))
