"""RLCD (arXiv 2307.12950): the student answers once after a good beginning and once after a bad one.

The response after the good beginning is labelled better, without any scoring (section 3). The paper trains a preference
model on the pairs and uses PPO; here DPO learns from them.
"""

from __future__ import annotations

from macpo.method.pairs import TeacherPairInputs, TeacherPairs
from macpo.method.steps import Steps
from macpo.methods.naive import started

BETTER, WORSE = "(giving a helpful and harmless response)", "(giving an unhelpful or harmful response)"
"""What is put before the responses, in our words; the paper has two such pairs for each of its tasks."""


def rlcd(steps: Steps) -> None:
    """`iterations` rounds of contrasting beginnings."""
    start, student = started(steps), steps.student
    for t in range(1, steps.recipe.iterations + 1):
        last = start.positive[student.name]
        better, worse = (
            steps.response(student, "positive", t - 1, last, draw=draw, begin=begin)
            for draw, begin in ((2, BETTER), (3, WORSE))
        )
        inputs = TeacherPairInputs(data=steps.data, positives={student.name: better}, negatives={student.name: worse})
        pairs = steps.add(f"iter{t}-{student.name}-pairs", TeacherPairs(seed=steps.recipe.seed, inputs=inputs))
        start.positive[student.name] = steps.prefer(student, t, last, pairs)
        steps.evaluate(student, t, start.positive[student.name], "student")
