"""Responses that a model rates, and the pairs that follow: the best against the worst of a prompt."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Self

from macpo.agent_settings import AgentSettings
from macpo.engine.data.records import Pair, Prompt, Response, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import Cost, MethodStage, RunSize
from macpo.method.encoding import encode
from macpo.method.likelihoods import likelihoods
from macpo.method.policies import OpenPolicy, PolicyDataInputs, PolicyStage
from macpo.method.responses import read_responses
from macpo.method.run_plan import StageName
from macpo.method.steps import Steps

Ratings = dict[str, list[float]]
"""Prompt id -> a rating of each response to it, in the order of the stage's `responses`."""
Draws = dict[str, str]
"""Number of a draw -> the stage in which the student answered."""
_REPLY_TOKENS = 8  # of context that a one-letter reply may need, whatever the template writes around it


class RatingInputs(PolicyDataInputs):
    answers: Draws


class Rate(PolicyStage):
    """A policy is asked about responses in words, and its next token is looked at; writes `ratings.jsonl`.

    Every prompt with a response in each draw is rated.
    """

    question: str
    """The text that is asked, with {conversation} and more in braces."""
    inputs: RatingInputs

    @classmethod
    def of(cls, steps: Steps, agent: AgentSettings, policy: StageName | None, question: str, draws: Draws) -> Self:
        """The stage in which an agent's policy is asked one of macpo/methods/prompts about the student's draws."""
        text = files("macpo.methods").joinpath("prompts", f"{question}.txt").read_text(encoding="utf-8")
        return cls(
            policy=steps.policy(agent, ready=agent.positive if policy is None else None),
            question=text,
            inputs=RatingInputs(base=steps.base(agent), data=steps.data, policy=policy, answers=draws),
            compute=steps.compute,
        )

    @abstractmethod
    def asked(self, prompt: Prompt, responses: list[Response]) -> list[tuple[Prompt, list[str]]]:
        """The questions about the responses to one prompt, each with the replies whose probability counts."""

    @abstractmethod
    def rated(self, found: list[list[float]]) -> list[float]:
        """A rating of each response, from the log-probs (nats) of each question's replies."""

    def run(self, ctx: StageContext) -> None:
        policy = _asking(self.open_policy(ctx), _REPLY_TOKENS)
        cases = list(_answered(ctx, self.inputs.data, self.inputs.answers))
        asked = [self.asked(prompt, responses) for prompt, responses in cases]
        logps = iter(self._logps(policy, [each for questions in asked for each in questions]))
        rows, dropped = [], 0
        for (prompt, _), questions in zip(cases, asked, strict=True):
            found = [next(logps) for _ in questions]
            kept = [each for each in found if each is not None]
            dropped += len(kept) < len(found)
            if len(kept) == len(found):
                rows.append({"prompt_id": prompt.id, "ratings": self.rated(kept)})
        if ctx.world.is_main:
            write_jsonl(ctx.dir / "ratings.jsonl", rows)
        ctx.note(rated=len(rows), **({"dropped_long_question": dropped} if dropped else {}))

    def _logps(self, policy: OpenPolicy, asked: list[tuple[Prompt, list[str]]]) -> list[list[float] | None]:
        """The log-probs of each question's replies; None for a question that does not fit."""
        items = [(prompt, [(reply, False) for reply in replies]) for prompt, replies in asked]
        groups, kept, _ = encode(policy, items)
        policy.ctx.note(tokens=sum(len(g.prompt_ids) + sum(map(len, g.responses)) for g in groups))
        found: list[list[float] | None] = [None] * len(asked)
        for index, group in zip(kept, likelihoods(policy, groups), strict=True):
            found[index] = [each.sum_logp for each in group]
        return found

    def cost(self, run: RunSize) -> Cost:
        per_prompt = len(self.inputs.answers) * (run.prompt_tokens + len(self.question) / 4 + 2 * run.response_tokens)
        return self.forward(run, run.student_prompts * per_prompt)

    def disk_bytes(self, run: RunSize) -> float:
        return 60 * run.student_prompts


def _asking(policy: OpenPolicy, reply_tokens: int) -> OpenPolicy:
    """The policy with all of its context for questions; one that is too long is dropped, not cut."""
    room = policy.agent.context_tokens - reply_tokens
    return replace(policy, agent=policy.agent.model_copy(update={"max_prompt_tokens": room, "long_prompt": "drop"}))


def softmax(logps: list[float]) -> list[float]:
    """Probabilities that sum to 1."""
    top = max(logps)
    weights = [math.exp(each - top) for each in logps]
    return [each / sum(weights) for each in weights]


def _answered(ctx: StageContext, data: str, draws: Mapping[str, str]) -> Iterator[tuple[Prompt, list[Response]]]:
    """The student's prompts that have a response in each draw, with the responses in the order of the draws."""
    given = [read_responses(ctx.input(draws[name])) for name in sorted(draws)]
    for prompt in read_records(ctx.input(data) / "student.jsonl", Prompt):
        if all(prompt.id in responses for responses in given):
            yield prompt, [responses[prompt.id] for responses in given]


def read_ratings(folder: Path) -> Ratings:
    """The ratings that a stage wrote."""
    return {row["prompt_id"]: row["ratings"] for _, row in read_jsonl(folder / "ratings.jsonl")}


class RatedPairInputs(StageInputs):
    data: str
    answers: Draws
    ratings: dict[str, str]
    """Who rated -> the stage."""


class RatedPairs(MethodStage):
    """Each prompt's best response against its worst, by the mean of all ratings; ties are dropped."""

    name = "rated_pairs"
    doing = "makes pairs of rated responses"
    least: float = 0.0
    """Pairs whose ratings differ by less are dropped, as are those that do not differ."""
    inputs: RatedPairInputs

    def run(self, ctx: StageContext) -> None:
        by_rater = [read_ratings(ctx.input(stage)) for stage in self.inputs.ratings.values()]
        pairs, dropped = [], Counter[str]()
        for prompt, responses in _answered(ctx, self.inputs.data, self.inputs.answers):
            given = [ratings[prompt.id] for ratings in by_rater if prompt.id in ratings]
            if not given:
                dropped["not_rated"] += 1
                continue
            means = [fmean(column) for column in zip(*given, strict=True)]
            best, worst = responses[means.index(max(means))], responses[means.index(min(means))]
            if max(means) - min(means) < self.least or max(means) == min(means):
                dropped["tied"] += 1
            elif (best.text, best.finished) == (worst.text, worst.finished):
                dropped["identical"] += 1
            else:
                texts = (best.text, worst.text, best.finished, worst.finished, best.agent, worst.agent)
                pairs.append(Pair(prompt, *texts))
        if not pairs:
            raise DataError(
                f"the ratings leave no pair ({json.dumps(dropped)})",
                "rate with a model that follows instructions, or leave the method out",
                field=ctx.name,
            )
        write_records(ctx.dir / "pairs.jsonl", pairs)
        ctx.note(pairs=len(pairs), **{f"dropped_{name}": count for name, count in dropped.items()})
