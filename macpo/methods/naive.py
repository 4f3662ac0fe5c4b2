"""Naive weak-to-strong fine-tuning (arXiv 2312.09390): the student imitates its weak teachers' labels.

With `initial.weak_label: min-perplexity` the labels are filtered by the student's own base model. Every other baseline
begins here.
"""

from __future__ import annotations

from dataclasses import dataclass

from macpo.method.run_plan import Policies, StageName
from macpo.method.steps import Steps


@dataclass(frozen=True, slots=True)
class Start:
    """Where the naive student stands: every agent's policy, the teachers' responses, and the labels it learned from."""

    positive: Policies
    responses: dict[str, StageName]
    labels: StageName

    @property
    def examples(self) -> tuple[StageName, str]:
        return self.labels, "examples.jsonl"


def labelled(steps: Steps) -> Start:
    """The weak teachers learn from human labels, then answer and label the student's prompts."""
    positive: Policies = {}
    responses: dict[str, StageName] = {}
    for teacher in steps.teachers:
        human = (steps.data, f"teacher-{teacher.name}.jsonl")
        positive[teacher.name] = steps.imitate(teacher, "positive", None, human, "chosen")
        responses[teacher.name] = steps.response(teacher, "positive", 0, positive[teacher.name])
    return Start(positive, responses, steps.weak_labels(responses))


def started(steps: Steps) -> Start:
    """The naive student, evaluated beside its teachers."""
    start, student = labelled(steps), steps.student
    start.positive[student.name] = steps.imitate(student, "positive", None, start.examples, "answer")
    steps.evaluate_all(0, start.positive)
    return start


def naive(steps: Steps) -> None:
    """SFT on the weak labels, and no more."""
    started(steps)
