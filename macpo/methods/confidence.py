"""The auxiliary confidence loss (arXiv 2312.09390): the student may disagree with a weak label where it is sure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from macpo.method.learning import Imitate, ImitateInputs
from macpo.method.steps import Steps
from macpo.methods.naive import labelled

if TYPE_CHECKING:
    from macpo.engine.training.objectives import Objective

WEIGHT = 0.5
"""alpha_max; the paper takes .75 for the largest students."""
WARMUP = 0.2
"""Share of the training over which the weight grows."""


def confidence(steps: Steps) -> None:
    """SFT on the weak labels under the confidence loss."""
    start, student = labelled(steps), steps.student
    work = ImitateConfidently(
        policy=steps.policy(student),
        optim=steps.training(student).positive,
        tuning=student.tuning,
        file=start.examples[1],
        side="answer",
        seed=steps.seed(student, "positive"),
        confidence=WEIGHT,
        warmup=WARMUP,
        inputs=ImitateInputs(base=steps.base(student), examples=start.labels),
        compute=steps.compute,
    )
    start.positive[student.name] = steps.add(f"init-{student.name}-confident", work)
    steps.evaluate_all(0, start.positive)


class ImitateConfidently(Imitate):
    """SFT with the confidence loss."""

    name = "imitate_confidently"
    doing = "SFT with its own confidence"
    confidence: float
    warmup: float

    def objective(self) -> Objective:
        from macpo.engine.training.confidence import confident_sft

        return confident_sft(self.confidence, self.warmup)
