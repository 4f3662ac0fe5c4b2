"""Contrastive pairs: a positive from another agent (unfamiliar) against a negative of one's own (familiar)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from macpo.engine.data.records import Pair, Prompt, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import write_jsonl
from macpo.engine.run.context import StageContext
from macpo.method.negatives import answers_by_agent, pick_answer
from macpo.method.positives import choose, read_candidates


@dataclass(frozen=True, slots=True)
class _Positive:
    text: str
    finished: bool
    by: str
    logp: float | None = None


def student_pairs(ctx: StageContext) -> None:
    """The kept candidate of every prompt against the negative answer; writes `scores.jsonl` and `pairs.jsonl`.

    The kept candidate's log-prob goes along: the scorer is the policy about to be trained.
    """
    rows, positives = [], {}
    for prompt_id, candidates in sorted(read_candidates(ctx).items()):
        index, why = choose(candidates, ctx.settings["selection"], ctx.settings["seed"], prompt_id)
        kept = candidates[index]
        positives[prompt_id] = _Positive(kept["text"], kept["finished"], kept["by"], kept["sum_logp"])
        rows.append({"prompt_id": prompt_id, "candidates": candidates, "kept": index, "why": why})
    write_jsonl(ctx.dir / "scores.jsonl", rows)
    _write_pairs(ctx, positives)


def teacher_pairs(ctx: StageContext) -> None:
    """The one positive answer of every prompt (the student's, or the agent's own) against the negative answer."""
    (answers,) = answers_by_agent(ctx, "positives").values()
    _write_pairs(ctx, {i: _Positive(r.text, r.finished, r.agent) for i, r in answers.items()})


def _write_pairs(ctx: StageContext, positives: dict[str, _Positive]) -> None:
    """Join with the negatives, drop what cannot teach, count why; raises DataError (3) when nothing is left."""
    negatives = answers_by_agent(ctx, "negatives")
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for prompt in read_records(ctx.input("data") / "student.jsonl", Prompt):
        good = positives.get(prompt.id)
        bad = pick_answer(ctx.settings["seed"], "negative", prompt.id, negatives)
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
            "look at the answers of the stages it read; longer answers or another negatives.source give pairs",
            field=ctx.name,
        )
    write_records(ctx.dir / "pairs.jsonl", pairs)
    ctx.note(pairs=len(pairs), **{f"dropped_{name}": count for name, count in dropped.items()})
