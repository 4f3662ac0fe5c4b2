"""Held-out evaluation: a policy answers prompts and judges their human pairs; training reads none of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from macpo import demo_world
from macpo.engine.data.records import Pair, Prompt, Response, read_records
from macpo.engine.files import read_jsonl, write_json, write_jsonl
from macpo.engine.run.context import StageContext
from macpo.evaluation import metrics as evaluate
from macpo.evaluation.summary import Role
from macpo.method.costs import Cost, RunSize
from macpo.method.encoding import encode_pairs
from macpo.method.likelihoods import likelihoods
from macpo.method.policies import OpenPolicy, PolicyDataInputs, PolicyStage
from macpo.method.responses import GeneratingStage

SIDES = ("chosen", "rejected")
HeldOut: TypeAlias = Literal["test", "dev"]


def held_out_pairs(folder: Path, held_out: HeldOut) -> list[Pair]:
    """The test or development prompts of the data stage, with their human responses."""
    return read_records(folder / f"{held_out}.jsonl", Pair)


def num_held_out(run: RunSize, held_out: HeldOut) -> int:
    return run.test_prompts if held_out == "test" else run.dev_prompts


def human_pair_logps(policy: OpenPolicy, pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """Summed log-probs of the human chosen and rejected responses under the policy, by prompt id."""
    groups, kept, _ = encode_pairs(policy, pairs)
    return {
        pairs[index].prompt.id: {
            key: value
            for side, s in zip(SIDES, pair, strict=True)
            for key, value in ((f"{side}_logp", s.sum_logp), (f"{side}_tokens", s.num_tokens))
        }
        for index, pair in zip(kept, likelihoods(policy, groups), strict=True)
    }


def response_row(prompt: Prompt, given: Response | None, *, gold: bool) -> dict[str, Any]:
    """A row of `evaluation.jsonl`: a prompt with the response to it, which is empty where there is none.

    `gold`: whether the demo world scores it.
    """
    row: dict[str, Any] = {"prompt_id": prompt.id, "prompt": list(prompt.messages)}
    row |= {"answer": given.text if given else "", "finished": bool(given and given.finished)}
    if gold:
        row["gold"] = demo_world.gold(prompt.messages, row["answer"])
    return row


def response_metrics(rows: list[dict[str, Any]], *, gold: bool) -> dict[str, Any]:
    """Length and variety of the responses in such rows, and their mean gold score."""
    found: dict[str, Any] = dict(
        evaluate.response_stats([row["answer"] for row in rows], [row["finished"] for row in rows])
    )
    return found | evaluate.gold_mean([row["gold"] for row in rows]) if gold else found


class BaseLogps(PolicyStage):
    """Log-probs of the human held-out pairs under the agent's base model: the reference of the implicit reward."""

    name = "judge_base"
    doing = "scores human pairs"
    held_out: HeldOut = "test"
    inputs: PolicyDataInputs

    def run(self, ctx: StageContext) -> None:
        pairs = held_out_pairs(ctx.input(self.inputs.data), self.held_out)
        logps = human_pair_logps(self.open_policy(ctx), pairs)
        if ctx.world.is_main:
            write_jsonl(ctx.dir / "logps.jsonl", [{"prompt_id": i, **row} for i, row in sorted(logps.items())])

    def cost(self, run: RunSize) -> Cost:
        num_prompts = num_held_out(run, self.held_out)
        return self.forward(run, num_prompts * (run.prompt_tokens + 2 * run.response_tokens))

    def disk_bytes(self, run: RunSize) -> float:
        return 150 * num_held_out(run, self.held_out)


class EvaluateInputs(PolicyDataInputs):
    base_logps: str | None = None
    """None where the policy's weights are not here: no preference metrics then."""


class EvaluatePolicy(GeneratingStage):
    """Responses, gold scores where the world has them, and preference metrics; `evaluation.json` and `.jsonl`."""

    name = "evaluate_policy"
    doing = "writes and scores test responses"
    weight = 2.0
    role: Role
    iteration: int
    beta: float
    """Scale of the implicit reward."""
    gold: bool
    held_out: HeldOut = "test"
    inputs: EvaluateInputs

    def run(self, ctx: StageContext) -> None:
        policy = self.open_policy(ctx)
        pairs = held_out_pairs(ctx.input(self.inputs.data), self.held_out)
        written, counts = self.generate(policy, [pair.prompt for pair in pairs])
        responses = {response.prompt_id: response for response in written}
        logps, base = {}, {}
        if self.inputs.base_logps is not None:
            logps = human_pair_logps(policy, pairs)
            path = ctx.input(self.inputs.base_logps) / "logps.jsonl"
            base = {row["prompt_id"]: row for _, row in read_jsonl(path)}
        rows = []
        for prompt in sorted((pair.prompt for pair in pairs), key=lambda p: p.id):
            row = response_row(prompt, responses.get(prompt.id), gold=self.gold)
            if prompt.id in logps and prompt.id in base:
                row |= logps[prompt.id]
                row |= {f"base_{side}_logp": base[prompt.id][f"{side}_logp"] for side in SIDES}
            rows.append(row)
        if ctx.world.is_main:
            about = {"role": self.role, "iteration": self.iteration}
            write_json(ctx.dir / "evaluation.json", {**about, **counts, **self._metrics(rows)})
            write_jsonl(ctx.dir / "evaluation.jsonl", rows)

    def _metrics(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = response_metrics(rows, gold=self.gold)
        judged = [row for row in rows if "chosen_logp" in row]
        if judged:
            columns = [[row[f"{prefix}{side}_logp"] for row in judged] for prefix in ("", "base_") for side in SIDES]
            tokens = {f"{side}_tokens": [row[f"{side}_tokens"] for row in judged] for side in SIDES}
            found |= evaluate.preference_metrics(*columns, beta=self.beta, **tokens)
        return found

    def cost(self, run: RunSize) -> Cost:
        num_prompts = num_held_out(run, self.held_out)
        answering = self.answering(run, num_prompts)
        judging = self.forward(run, num_prompts * (run.prompt_tokens + 2 * run.response_tokens))
        return replace(answering, tokens=judging.tokens + answering.tokens, flop=judging.flop + answering.flop)

    def disk_bytes(self, run: RunSize) -> float:
        return num_held_out(run, self.held_out) * (run.row_bytes(1) + 200)
