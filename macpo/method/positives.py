"""Positive behaviour: which better response an agent is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.records import Example, Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import Cost, MethodStage, RunSize
from macpo.method.encoding import encode
from macpo.method.likelihoods import Likelihood, likelihoods
from macpo.method.negatives import pick_response, random_name, responses_by_agent
from macpo.method.policies import OpenPolicy, PolicyDataInputs, PolicyStage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response that was scored; `by`: the agent that wrote it."""

    by: str
    text: str
    finished: bool
    sum_logp: float
    num_tokens: int
    perplexity: float


Half = Literal[0, 1]
"""Of the student's prompts, for a cross-fitted choice."""


def half_of(prompt_id: str) -> int:
    """Which half a prompt is in, by its id alone."""
    return hashlib.sha256(f"half/{prompt_id}".encode()).digest()[0] & 1


class ScoreInputs(PolicyDataInputs):
    answers: dict[str, str]
    """Agent -> the stage in which it answered."""


class ScoreCandidates(PolicyStage):
    """The policy scores every agent's response to every prompt, K responses behind one shared prefix."""

    name = "score_candidates"
    doing = "scores candidates"
    own: str | None = None
    """The agent whose responses the scoring weights drew themselves. In float32 these need not be scored again where
    the tokens of the text are those that were drawn. In 16 bits scoring and generation round differently, and
    reference log-probs come from here."""
    half: Half | None = None
    """Only these prompts are scored, by weights that learnt from the others' labels."""
    inputs: ScoreInputs

    def run(self, ctx: StageContext) -> None:
        import torch

        from macpo.engine.models.compute import dtype_of

        policy = self.open_policy(ctx)
        responses = responses_by_agent(ctx, self.inputs.answers)
        items: list[tuple[Prompt, list[Response]]] = []
        for prompt in read_records(ctx.input(self.inputs.data) / "student.jsonl", Prompt):
            if self.half is not None and half_of(prompt.id) != self.half:
                continue
            given = [responses[name][prompt.id] for name in sorted(responses) if prompt.id in responses[name]]
            if given:
                items.append((prompt, given))
        groups, kept, _ = encode(policy, [(prompt, [(r.text, r.finished) for r in given]) for prompt, given in items])
        own = self.own if dtype_of(self.compute) == torch.float32 else None
        given_by_group = [items[index][1] for index in kept]
        known = [
            [as_generated(r, ids) if r.agent == own else None for r, ids in zip(given, group.responses, strict=True)]
            for given, group in zip(given_by_group, groups, strict=True)
        ]
        scores = _with_known(policy, groups, known)
        if own is not None:
            ctx.note(scored_while_generated=sum(found is not None for group in known for found in group))
        rows = []
        for index, results in zip(kept, scores, strict=True):
            prompt, given = items[index]
            candidates = [
                Candidate(r.agent, r.text, r.finished, found.sum_logp, found.num_tokens, found.perplexity)
                for r, found in zip(given, results, strict=True)
            ]
            rows.append({"prompt_id": prompt.id, "candidates": [asdict(each) for each in candidates]})
        if ctx.world.is_main:
            write_jsonl(ctx.dir / "candidates.jsonl", rows)
        ctx.note(tokens=sum(len(g.prompt_ids) + sum(map(len, g.responses)) for g in groups))

    def cost(self, run: RunSize) -> Cost:
        responses = len(self.inputs.answers) * run.response_tokens
        return self.forward(run, self._num_prompts(run) * (run.prompt_tokens + responses))

    def disk_bytes(self, run: RunSize) -> float:
        return self._num_prompts(run) * run.row_bytes(len(self.inputs.answers), prompt=False)

    def _num_prompts(self, run: RunSize) -> float:
        return run.student_prompts * (1 if self.half is None else 0.5)


def as_generated(response: Response, ids: list[int]) -> Likelihood | None:
    """A response's likelihood under its author, as far as it is known: of these very token ids."""
    if response.sum_logp is None or response.ids_digest != ids_digest(ids):
        return None
    return Likelihood(response.sum_logp, len(ids))


def _with_known(
    policy: OpenPolicy, groups: list[PrefixGroup], known: list[list[Likelihood | None]]
) -> list[list[Likelihood]]:
    """The likelihoods of all responses; only those that are not known are scored."""
    todo = [
        PrefixGroup(group.prompt_ids, [ids for ids, one in zip(group.responses, own, strict=True) if one is None])
        for group, own in zip(groups, known, strict=True)
    ]
    asked = [group for group in todo if group.responses]
    found: Iterator[Likelihood] = chain.from_iterable(likelihoods(policy, asked)) if asked else iter(())
    return [[next(found) if one is None else one for one in own] for own in known]


def choose(candidates: Sequence[Candidate], selection: str, seed: int, prompt_id: str) -> tuple[int, str]:
    """Index of the candidate to keep and the reason in words; ties go to the first agent by name."""
    perplexities = [candidate.perplexity for candidate in candidates]
    if selection == "random":
        name = random_name(seed, "positive", prompt_id, [candidate.by for candidate in candidates])
        return [candidate.by for candidate in candidates].index(name), f"random choice of {len(candidates)}"
    best = min(perplexities) if selection == "min-perplexity" else max(perplexities)
    word = "lowest" if selection == "min-perplexity" else "highest"
    return perplexities.index(best), f"{word} perplexity of {len(candidates)}: {best:.3f}"


def read_candidates(folder: Path) -> dict[str, list[Candidate]]:
    """Scored responses by prompt id, from a scoring stage's folder."""
    rows = (row for _, row in read_jsonl(folder / "candidates.jsonl"))
    return {row["prompt_id"]: [Candidate(**each) for each in row["candidates"]] for row in rows}


class WeakLabelInputs(StageInputs):
    data: str
    scores: str | None = None
    """The scoring stage, where the rule goes by perplexity."""
    answers: dict[str, str] = Field(default_factory=dict)
    """Teacher -> the stage in which it answered, where the rule does not."""


class WeakLabels(MethodStage):
    """The student's first labels: one teacher response a prompt, by `initial.weak_label`."""

    name = "weak_labels"
    doing = "picks first labels"
    weak_label: str
    seed: int
    inputs: WeakLabelInputs

    def run(self, ctx: StageContext) -> None:
        prompts = read_records(ctx.input(self.inputs.data) / "student.jsonl", Prompt)
        examples: list[Example] = []
        if self.inputs.scores is not None:
            candidates = read_candidates(ctx.input(self.inputs.scores))
            for prompt in prompts:
                if prompt.id in candidates:
                    index, _ = choose(candidates[prompt.id], self.weak_label, self.seed, prompt.id)
                    kept = candidates[prompt.id][index]
                    examples.append(Example(prompt, kept.text, kept.finished, kept.by))
        else:
            responses = responses_by_agent(ctx, self.inputs.answers)
            for prompt in prompts:
                label = pick_response(self.seed, "weak-label", prompt.id, responses)
                if label:
                    examples.append(Example(prompt, label.text, label.finished, label.agent))
        write_records(ctx.dir / "examples.jsonl", examples)
        ctx.note(examples=len(examples))

    def disk_bytes(self, run: RunSize) -> float:
        return run.student_prompts * run.row_bytes(1)
