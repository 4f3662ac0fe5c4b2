"""SPIN (arXiv 2401.01335): the student prefers its labels to its own last responses, round after round.

The loss is DPO's with the last student as the reference (eq. 4.7). As in the authors' scripts a round trains on its own
pairs and on those of the round before. Their labels are human; a weak-to-strong student has weak ones.
"""

from __future__ import annotations

from collections import Counter

from macpo.engine.data.records import Example, Pair, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import MethodStage, RunSize
from macpo.method.responses import read_responses
from macpo.method.run_plan import StageName
from macpo.method.steps import Steps
from macpo.methods.naive import started


def spin(steps: Steps) -> None:
    """`iterations` rounds of self-play against the labels."""
    start, student = started(steps), steps.student
    responses: list[StageName] = []
    for t in range(1, steps.recipe.iterations + 1):
        responses.append(steps.own_sample(student, t, start.positive))
        last = dict(zip(("own", "before"), reversed(responses), strict=False))
        inputs = SelfPlayInputs(labels=start.labels, **last)
        pairs = steps.add(f"iter{t}-{student.name}-pairs", SelfPlayPairs(inputs=inputs))
        start.positive[student.name] = steps.prefer(
            student, t, start.positive[student.name], pairs, pairs_per_prompt=len(last)
        )
        steps.evaluate(student, t, start.positive[student.name], "student")


class SelfPlayInputs(StageInputs):
    labels: str
    own: str
    """The last student's responses."""
    before: str | None = None
    """Those of the student before it."""


class SelfPlayPairs(MethodStage):
    """Labels against the student's own responses of this round and of the one before."""

    name = "self_play_pairs"
    doing = "makes self-play pairs"
    inputs: SelfPlayInputs

    def run(self, ctx: StageContext) -> None:
        labels = read_records(ctx.input(self.inputs.labels) / "examples.jsonl", Example)
        pairs, dropped = [], Counter[str]()
        for stage in filter(None, (self.inputs.before, self.inputs.own)):
            responses = read_responses(ctx.input(stage))
            for label in labels:
                own = responses.get(label.prompt.id)
                if own is None or (own.text, own.finished) == (label.response, label.finished):
                    dropped["no_negative" if own is None else "identical"] += 1
                    continue
                texts = (label.response, own.text, label.finished, own.finished, label.by, own.agent)
                pairs.append(Pair(label.prompt, *texts))
        if not pairs:
            raise DataError("the student answers every prompt with its label: there is nothing to prefer",
                            "train fewer iterations", field=ctx.name)  # fmt: skip
        write_records(ctx.dir / "pairs.jsonl", pairs)
        ctx.note(pairs=len(pairs), **{f"dropped_{name}": count for name, count in dropped.items()})

    def disk_bytes(self, run: RunSize) -> float:
        return super().disk_bytes(run) * (1 if self.inputs.before is None else 2)
