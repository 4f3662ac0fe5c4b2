"""RLAIF (arXiv 2309.00267, after 2212.08073): the weak teachers say which of two responses of the student is better.

A labeller's preference is the probability of one of two verdicts, averaged over both orders of the responses
(2309.00267, section 2.1 and 3.1); here also over the teachers. The papers train a reward model and use RL; here DPO
learns from the pairs whose preference is clear, so that the method differs from the others in its labels alone.
"""

from __future__ import annotations

from macpo.engine.data.records import Prompt, Response
from macpo.judging.questions import conversation
from macpo.method.steps import Steps
from macpo.methods.naive import started
from macpo.methods.ratings import Rate, RatedPairInputs, RatedPairs, softmax

LEAST_PREFERENCE = 0.2
"""How far the two responses' probabilities have to lie apart: |p - .5| >= .1."""


def rlaif(steps: Steps) -> None:
    """`iterations` rounds of two responses a prompt, labelled by the teachers."""
    start, student = started(steps), steps.student
    for t in range(1, steps.recipe.iterations + 1):
        last = start.positive[student.name]
        draws = {str(n): steps.own_sample(student, t, start.positive, draw=n) for n in range(2)}
        ratings = {
            each.name: steps.add(
                f"iter{t}-{each.name}-compare", Compare.of(steps, each, start.positive[each.name], "compare", draws)
            )
            for each in steps.teachers
        }
        inputs = RatedPairInputs(data=steps.data, answers=draws, ratings=ratings)
        pairs = steps.add(f"iter{t}-{student.name}-pairs", RatedPairs(least=LEAST_PREFERENCE, inputs=inputs))
        start.positive[student.name] = steps.prefer(student, t, last, pairs)
        steps.evaluate(student, t, start.positive[student.name], "student")


class Compare(Rate):
    """The probability that each of two responses is the better one."""

    name = "compare_answers"
    doing = "compares responses"

    def asked(self, prompt: Prompt, responses: list[Response]) -> list[tuple[Prompt, list[str]]]:
        about, (one, two) = conversation(prompt.messages), [response.text for response in responses]
        orders = ((one, two), (two, one))
        return [
            (Prompt.of(self.question.format(conversation=about, a=first, b=second)), ["A", "B"])
            for first, second in orders
        ]

    def rated(self, found: list[list[float]]) -> list[float]:
        as_first, as_second = (softmax(logps) for logps in found)
        preference = (as_first[0] + as_second[1]) / 2
        return [preference, 1 - preference]
