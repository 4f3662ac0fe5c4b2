"""Self-rewarding language models (arXiv 2401.10020): the student grades its own responses and learns from the grades.

A round draws NUM_RESPONSES responses a prompt, grades each from 0 to 5 by an additive rubric, and prefers the best to
the worst by DPO from the last student, which is the reference too. The paper samples the grade as text and averages
three; here it is the expected grade under the probabilities of the six, which needs no model that was trained to grade.
"""

from __future__ import annotations

from macpo.engine.data.records import Prompt, Response
from macpo.judging.questions import conversation
from macpo.method.steps import Steps
from macpo.methods.naive import started
from macpo.methods.ratings import Rate, RatedPairInputs, RatedPairs, softmax

NUM_RESPONSES = 4
GRADES = "012345"


def rewarding(steps: Steps) -> None:
    """`iterations` rounds in which the student is its own judge."""
    start, student = started(steps), steps.student
    for t in range(1, steps.recipe.iterations + 1):
        last = start.positive[student.name]
        draws = {str(n): steps.own_sample(student, t, start.positive, draw=n) for n in range(NUM_RESPONSES)}
        grades = steps.add(f"iter{t}-{student.name}-grade", Grade.of(steps, student, last, "grade", draws))
        inputs = RatedPairInputs(data=steps.data, answers=draws, ratings={student.name: grades})
        pairs = steps.add(f"iter{t}-{student.name}-pairs", RatedPairs(inputs=inputs))
        start.positive[student.name] = steps.prefer(student, t, last, pairs)
        steps.evaluate(student, t, start.positive[student.name], "student")


class Grade(Rate):
    """The expected grade of each response."""

    name = "grade_answers"
    doing = "grades responses"

    def asked(self, prompt: Prompt, responses: list[Response]) -> list[tuple[Prompt, list[str]]]:
        about = conversation(prompt.messages)
        texts = [self.question.format(conversation=about, response=each.text) for each in responses]
        return [(Prompt.of(text), list(GRADES)) for text in texts]

    def rated(self, found: list[list[float]]) -> list[float]:
        return [sum(grade * share for grade, share in enumerate(softmax(logps))) for logps in found]
