"""Held-out evaluation: every policy answers the test prompts and judges the human pairs; training reads none of it."""

from __future__ import annotations

import shutil
from typing import Any

from macpo import demo_world
from macpo.engine.config import ComputeSettings, ServedSettings
from macpo.engine.data.records import Pair, read_records
from macpo.engine.files import read_jsonl, write_json, write_jsonl
from macpo.engine.run.context import StageContext
from macpo.evaluation import metrics as evaluate
from macpo.method.answers import generate_answers
from macpo.method.encoding import encode
from macpo.method.likelihoods import likelihoods
from macpo.method.policies import agent_chat, load_policy

SIDES = ("chosen", "rejected")


def human_pair_logps(compute: ComputeSettings, ctx: StageContext, pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """Summed log-probs of the human chosen and rejected answers under the stage's policy, by prompt id."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    groups, kept = encode(ctx, agent_chat(ctx), items)
    scores = likelihoods(load_policy(compute, ctx), groups, compute, ctx.world, ctx.stop_requested)
    return {
        pairs[index].prompt.id: {
            key: value
            for side, s in zip(SIDES, pair, strict=True)
            for key, value in ((f"{side}_logp", s.sum_logp), (f"{side}_tokens", s.num_tokens))
        }
        for index, pair in zip(kept, scores, strict=True)
    }


def judge_base(compute: ComputeSettings, ctx: StageContext) -> None:
    """Log-probs of the human test pairs under the agent's base model: the reference of the implicit reward."""
    logps = human_pair_logps(compute, ctx, read_records(ctx.input("data") / "test.jsonl", Pair))
    if ctx.world.is_main:
        write_jsonl(ctx.dir / "logps.jsonl", [{"prompt_id": i, **row} for i, row in sorted(logps.items())])


def evaluate_policy(compute: ComputeSettings, ctx: StageContext, served: ServedSettings | None = None) -> None:
    """Answers, gold scores where the world has them, and preference metrics; `evaluation.json` and `.jsonl`.

    Without the input `base_logps` the policy's weights are not here: no preference metrics then.
    """
    pairs = read_records(ctx.input("data") / "test.jsonl", Pair)
    responses, counts = generate_answers(compute, ctx, [pair.prompt for pair in pairs], served)
    answers = {response.prompt_id: response for response in responses}
    logps, base = {}, {}
    if "base_logps" in ctx.inputs:
        logps = human_pair_logps(compute, ctx, pairs)
        base = {row["prompt_id"]: row for _, row in read_jsonl(ctx.input("base_logps") / "logps.jsonl")}
    rows = []
    for pair in sorted(pairs, key=lambda p: p.prompt.id):
        prompt, given = pair.prompt, answers.get(pair.prompt.id)
        row: dict[str, Any] = {"prompt_id": prompt.id, "prompt": list(prompt.messages)}
        row |= {"answer": given.text if given else "", "finished": bool(given and given.finished)}
        if ctx.settings["gold"]:
            row["gold"] = demo_world.gold(prompt.messages, row["answer"])
        if prompt.id in logps and prompt.id in base:
            row |= logps[prompt.id]
            row |= {f"base_{side}_logp": base[prompt.id][f"{side}_logp"] for side in SIDES}
        rows.append(row)
    metrics: dict[str, Any] = dict(
        evaluate.answer_stats([row["answer"] for row in rows], [row["finished"] for row in rows])
    )
    if ctx.settings["gold"]:
        metrics |= evaluate.gold_mean([row["gold"] for row in rows])
    judged = [row for row in rows if "chosen_logp" in row]
    if judged:
        columns = [[row[f"{prefix}{side}_logp"] for row in judged] for prefix in ("", "base_") for side in SIDES]
        tokens = {f"{side}_tokens": [row[f"{side}_tokens"] for row in judged] for side in SIDES}
        metrics |= evaluate.preference_metrics(*columns, beta=ctx.settings["beta"], **tokens)
    if ctx.world.is_main:
        about = {name: ctx.settings[name] for name in ("role", "iteration")}
        write_json(ctx.dir / "evaluation.json", {**about, **counts, **metrics})
        write_jsonl(ctx.dir / "evaluation.jsonl", rows)
        shutil.rmtree(ctx.dir / "waves")
