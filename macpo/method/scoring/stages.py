"""Scorers at work: every policy's responses are scored, and every scorer is compared with people."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from macpo.engine.config import ComputeSettings
from macpo.engine.data.records import Pair, Prompt, read_records
from macpo.engine.errors import MacpoError, Stopped
from macpo.engine.files import atomic_write, read_json, read_jsonl, write_json, write_jsonl
from macpo.engine.progress import counted
from macpo.engine.removal import make_way
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.evaluation.agreement import agreement
from macpo.evaluation.metrics import mean_and_se
from macpo.method.costs import Cost, MethodStage, RunSize
from macpo.method.scoring.scorers import Item, Score, Scorer

SCORES, AGREEMENT = "score.json", "agreement.json"


class ScoringInputs(StageInputs):
    reward: str | None = None
    """Trained the scorer; None of a ready one."""


class ScoringStage(MethodStage):
    """A kind of stage that scores responses; it resumes after the last wave that it scored."""

    scratch: ClassVar[tuple[str, ...]] = ("waves",)
    scorer: Scorer
    weights: dict[str, str] = Field(default_factory=dict)
    """Identity of each model folder or Hub id that the scorer reads."""
    inputs: ScoringInputs
    base: str | None = Field(None, exclude=True)
    """Whose shape in a RunSize the scorer has that was trained in the run."""
    compute: ComputeSettings = Field(exclude=True)

    def scored(self, ctx: StageContext, items: Sequence[Item]) -> list[Score]:
        """Score items; equal ones once. Each wave is shared by the ranks, and on disk once it is scored."""
        from macpo.engine.models.compute import wave_requests

        trained = None if self.inputs.reward is None else ctx.input(self.inputs.reward) / "policy"
        keys = [_key(item) for item in items]
        first = dict(zip(keys, items, strict=True))
        order, size = sorted(first), wave_requests(self.compute, "cpu")
        waves = [order[start : start + size] for start in range(0, len(order), size)]
        found: dict[str, Score] = {}
        score = None
        with counted(ctx.name if ctx.world.is_main else False, len(order), unit="responses scored") as count:
            for number, wave in enumerate(waves):
                path = ctx.dir / "waves" / f"{number:04d}.json"
                done = ctx.world.broadcast(_read(path, wave) if ctx.world.is_main else None)
                if done is None:
                    if any(ctx.world.gather(ctx.stop_requested())):
                        why = "stopped while scoring; the finished waves are kept"
                        raise Stopped(why, "run the same command again")
                    score = score or self.scorer.open(ctx, self.compute, trained)
                    done = [list(each) for each in score([first[key] for key in wave])]
                    if ctx.world.is_main:
                        path.parent.mkdir(exist_ok=True)
                        make_way(path, ctx.dir, ctx.log)
                        atomic_write(path, json.dumps({"keys": wave, "scores": done}))
                scores = [Score(*each) for each in done]
                found |= dict(zip(wave, scores, strict=True))
                count(len(wave), sum(each.tokens for each in scores))
        if score is not None:  # what comes next needs the memory
            from macpo.engine.distributed.failures import free_memory

            del score
            free_memory()
        ctx.note(scored=len(order), tokens=sum(each.tokens for each in found.values()))
        return [found[key] for key in keys]

    @abstractmethod
    def responses(self, run: RunSize) -> int:
        """How many responses are scored."""

    def cost(self, run: RunSize) -> Cost:
        tokens = self.responses(run) * (run.prompt_tokens + run.response_tokens)
        shape = run.shapes.get(self.base or "")
        return Cost(tokens, 2 * (shape.num_parameters if shape else self.scorer.num_parameters()) * tokens)

    def disk_bytes(self, run: RunSize) -> float:
        return 100 * self.responses(run)


def _key(item: Item) -> str:
    reply = item.reply if isinstance(item.reply, str) else json.dumps(item.reply, sort_keys=True)
    return hashlib.sha256(f"{item.prompt.id}:{item.finished}:{reply}".encode(errors="surrogatepass")).hexdigest()[:32]


def _read(path: Path, wave: Sequence[str]) -> list[list[Any]] | None:
    """The scores of a wave; None where it was not written, or is damaged or of other items."""
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path)
        scores = [[float(score), int(tokens)] for score, tokens in found["scores"]]
    except (MacpoError, KeyError, TypeError, ValueError):
        return None
    return scores if found["keys"] == list(wave) and len(scores) == len(wave) else None


class ScoreResponsesInputs(ScoringInputs):
    evaluation: str


class ScoreResponses(ScoringStage):
    """Scores of one policy's responses to the test prompts: `scores.jsonl`, and their mean in `score.json`."""

    name = "score_answers"
    doing = "scores test responses"
    inputs: ScoreResponsesInputs

    def run(self, ctx: StageContext) -> None:
        rows = [row for _, row in read_jsonl(ctx.input(self.inputs.evaluation) / "evaluation.jsonl")]
        items = [Item(Prompt(r["prompt_id"], tuple(r["prompt"])), r["answer"], r["finished"]) for r in rows]
        scores = self.scored(ctx, items)
        if ctx.world.is_main:
            told = [
                {"prompt_id": row["prompt_id"], "score": score.score, "tokens": score.tokens}
                for row, score in zip(rows, scores, strict=True)
            ]
            write_jsonl(ctx.dir / "scores.jsonl", told)
            mean, error = mean_and_se([score.score for score in scores])
            write_json(ctx.dir / SCORES, {"mean": mean, "se": error, "answers": len(scores)})

    def responses(self, run: RunSize) -> int:
        return run.test_prompts


class CheckScorerInputs(ScoringInputs):
    data: str


class CheckScorer(ScoringStage):
    """The scorer's scores of both responses of the human test pairs: `scores.jsonl`, and `agreement.json`."""

    name = "check_scorer"
    doing = "compares a scorer with people"
    inputs: CheckScorerInputs

    def run(self, ctx: StageContext) -> None:
        pairs = read_records(ctx.input(self.inputs.data) / "test.jsonl", Pair)
        items = [Item(p.prompt, p.reply(side), p.finished(side)) for p in pairs for side in ("chosen", "rejected")]
        scores = self.scored(ctx, items)
        chosen, rejected = scores[::2], scores[1::2]
        if ctx.world.is_main:
            rows = [
                {"prompt_id": pair.prompt.id, "chosen": better.score, "rejected": worse.score}
                for pair, better, worse in zip(pairs, chosen, rejected, strict=True)
            ]
            write_jsonl(ctx.dir / "scores.jsonl", rows)
            rewards = ([each.score for each in side] for side in (chosen, rejected))
            lengths = ([each.tokens for each in side] for side in (chosen, rejected))
            write_json(ctx.dir / AGREEMENT, agreement(*rewards, *lengths))

    def responses(self, run: RunSize) -> int:
        return 2 * run.test_prompts
