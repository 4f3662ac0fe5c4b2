"""Filtered SFT, iterated: the student keeps the labels that it finds plausible, and learns from them anew.

After co-supervised learning for text (arXiv 2402.15505), which assigns examples to teachers by the student's own
agreement and drops inconsistent ones; how many are dropped is a choice of ours.
"""

from __future__ import annotations

import math

from macpo.engine.data.records import Example, Prompt, read_records, write_records
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import MethodStage, RunSize
from macpo.method.positives import choose, read_candidates
from macpo.method.steps import Steps
from macpo.methods.naive import started

DROPPED = 0.2
"""Share of the prompts whose best response is the least plausible: these are left out of a round."""


def filtered(steps: Steps) -> None:
    """`iterations` rounds: each prompt's response of lowest perplexity under the last student, SFT from the base."""
    start, student = started(steps), steps.student
    for t in range(1, steps.recipe.iterations + 1):
        scores = steps.score(student, t, start.positive[student.name], start.responses)
        inputs = PlausibleInputs(data=steps.data, scores=scores)
        labels = steps.add(f"iter{t}-{student.name}-labels", PlausibleLabels(dropped=DROPPED, inputs=inputs))
        start.positive[student.name] = steps.imitate(
            student, "positive", None, (labels, "examples.jsonl"), "answer", name=f"iter{t}-{student.name}-train"
        )
        steps.evaluate(student, t, start.positive[student.name], "student")


class PlausibleInputs(StageInputs):
    data: str
    scores: str


class PlausibleLabels(MethodStage):
    """The response of lowest perplexity a prompt, without the share of prompts where even that is highest."""

    name = "plausible_labels"
    doing = "filters labels"
    dropped: float
    inputs: PlausibleInputs

    def run(self, ctx: StageContext) -> None:
        candidates = read_candidates(ctx.input(self.inputs.scores))
        best = {i: given[choose(given, "min-perplexity", 0, i)[0]] for i, given in candidates.items()}
        ranked = sorted(best, key=lambda i: (best[i].perplexity, i))
        kept = set(ranked[: math.ceil(len(ranked) * (1 - self.dropped))])
        examples = [
            Example(prompt, best[prompt.id].text, best[prompt.id].finished, best[prompt.id].by)
            for prompt in read_records(ctx.input(self.inputs.data) / "student.jsonl", Prompt)
            if prompt.id in kept
        ]
        write_records(ctx.dir / "examples.jsonl", examples)
        ctx.note(examples=len(examples), dropped_implausible=len(ranked) - len(kept))

    def disk_bytes(self, run: RunSize) -> float:
        return run.student_prompts * run.row_bytes(1)
