"""Contrastive pairs: a positive from another agent (unfamiliar) against a negative of one's own (familiar)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from macpo.engine.data.records import Pair, Prompt, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import write_jsonl
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import MethodStage, RunSize
from macpo.method.negatives import Responses, pick_response, responses_by_agent
from macpo.method.positives import choose, read_candidates


@dataclass(frozen=True, slots=True)
class _Positive:
    text: str
    finished: bool
    by: str
    logp: float | None = None


class StudentPairInputs(StageInputs):
    data: str
    scores: str
    other_half: str | None = None
    """The scores of the other half of the prompts, where halves were scored by policies of their own."""
    negatives: dict[str, str]
    """Agent -> the stage in which its negative policy answered."""


class StudentPairs(MethodStage):
    """The kept candidate of every prompt against the negative response; writes `scores.jsonl` and `pairs.jsonl`.

    The kept candidate's log-prob goes along where the scorer is the policy about to be trained.
    """

    name = "student_pairs"
    doing = "selects pairs"
    selection: str
    seed: int
    inputs: StudentPairInputs

    def run(self, ctx: StageContext) -> None:
        rows, positives, other = [], {}, self.inputs.other_half
        scored = read_candidates(ctx.input(self.inputs.scores))
        if other is not None:
            scored |= read_candidates(ctx.input(other))
        for prompt_id, candidates in sorted(scored.items()):
            index, why = choose(candidates, self.selection, self.seed, prompt_id)
            kept = candidates[index]
            logp = kept.sum_logp if other is None else None
            positives[prompt_id] = _Positive(kept.text, kept.finished, kept.by, logp)
            written = [asdict(each) for each in candidates]
            rows.append({"prompt_id": prompt_id, "candidates": written, "kept": index, "why": why})
        write_jsonl(ctx.dir / "scores.jsonl", rows)
        _write_pairs(ctx, self.inputs.data, positives, responses_by_agent(ctx, self.inputs.negatives), self.seed)

    def disk_bytes(self, run: RunSize) -> float:
        scores = run.row_bytes(run.num_teachers, prompt=False)
        return super().disk_bytes(run) + run.student_prompts * scores


class TeacherPairInputs(StageInputs):
    data: str
    positives: dict[str, str]
    """The one agent -> the stage in which the student, or the agent itself, answered."""
    negatives: dict[str, str]
    """Agent -> the stage in which its negative policy answered."""


class TeacherPairs(MethodStage):
    """The positive response to every prompt (the student's, or the agent's own) against the negative one."""

    name = "teacher_pairs"
    doing = "selects pairs"
    seed: int
    inputs: TeacherPairInputs

    def run(self, ctx: StageContext) -> None:
        (responses,) = responses_by_agent(ctx, self.inputs.positives).values()
        positives = {i: _Positive(r.text, r.finished, r.agent) for i, r in responses.items()}
        _write_pairs(ctx, self.inputs.data, positives, responses_by_agent(ctx, self.inputs.negatives), self.seed)


def _write_pairs(
    ctx: StageContext, data: str, positives: Mapping[str, _Positive], negatives: Responses, seed: int
) -> None:
    """Join positives with negatives, drop what cannot teach and count why.

    Raises:
        DataError: nothing is left.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for prompt in read_records(ctx.input(data) / "student.jsonl", Prompt):
        good = positives.get(prompt.id)
        bad = pick_response(seed, "negative", prompt.id, negatives)
        if good is None or bad is None:
            dropped["no_positive" if good is None else "no_negative"] += 1
        elif (good.text, good.finished) == (bad.text, bad.finished):
            dropped["identical"] += 1
        else:
            pairs.append(Pair(prompt, good.text, bad.text, good.finished, bad.finished, good.by, bad.agent, good.logp))
    if not pairs:
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(dropped.items()))
        raise DataError(
            f"the selection left no pair ({counts or 'no prompts'})",
            "look at the responses of the stages it read; longer responses or another negatives.source give pairs",
            field=ctx.name,
        )
    write_records(ctx.dir / "pairs.jsonl", pairs)
    ctx.note(pairs=len(pairs), **{f"dropped_{name}": count for name, count in dropped.items()})
