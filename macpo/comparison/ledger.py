"""What each arm of a plan takes: human labels, generated, scored and trained tokens, steps and FLOP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from macpo.config import Recipe
from macpo.method.base_models import PretrainBase
from macpo.method.costs import MethodStage, RunSize
from macpo.method.learning import Imitate, LearningStage, Prefer
from macpo.method.responses import Respond
from macpo.method.run_plan import Plan

HUMAN_FILES = ("teacher-", "student.jsonl")
"""How the files begin that hold human responses; only the ceiling reads the student's."""


@dataclass(slots=True)
class Ledger:
    """What it took to make an arm's last student, shared stages counted for every arm that needs them."""

    human_labels: int = 0
    """Pairs with a human's preference that training reads."""
    generated: int = 0
    """Tokens that agents wrote to learn from."""
    scored: int = 0
    """Tokens of prompts and responses that were scored."""
    trained: int = 0
    """Tokens that went through training steps, once for each epoch."""
    student_steps: int = 0
    """Optimiser steps of the student."""
    stages: int = 0
    own_stages: int = 0
    """Stages that no other arm needs."""
    flop: float = 0.0
    """Estimated from the shapes of models and data."""

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def ledgers(
    plan: Plan, run: RunSize, recipe: Recipe, counts: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Ledger]:
    """The ledger of each arm's last student, and under `ceiling` that of the student with human responses.

    Args:
        recipe: of the main arm.
        counts: what each finished stage noted (`tokens`, `steps`); estimated without.
    """
    needed = {name: _needed(plan, policy) for name, policy in last_students(plan).items()}
    found = {}
    for name, stages in needed.items():
        others = {each for arm, theirs in needed.items() if arm != name for each in theirs}
        ledger = Ledger(stages=len(stages), own_stages=len(stages - others))
        labels: dict[str, int] = {}
        for stage in (plan.graph.stage(each) for each in sorted(stages)):
            work = stage.work
            assert isinstance(work, MethodStage)
            _add(ledger, work, run, recipe.student.name, (counts or {}).get(stage.name, {}))
            if isinstance(work, Imitate | Prefer) and (
                work.file.startswith("teacher-") or work.file == "student.jsonl"
            ):
                labels[_labels(recipe, work.agent.name)] = work.num_rows(run)
        ledger.human_labels = sum(labels.values())
        found[name] = ledger
    return found


def _labels(recipe: Recipe, agent: str) -> str:
    """What an agent's human labels are called; teachers without data of their own have the same ones."""
    own = next((each.data for each in recipe.teachers if each.name == agent), None)
    alone = recipe.data.world is not None or agent == recipe.student.name
    return agent if alone else own or ""


def last_students(plan: Plan) -> dict[str, str]:
    """Arm -> the stage that made its last student; `ceiling` for the student with human responses."""
    found = {}
    for point in plan.points:
        if point.role in ("student", "ceiling") and point.policy is not None:
            found["ceiling" if point.role == "ceiling" else point.arm] = point.policy
    return found


def _needed(plan: Plan, name: str) -> set[str]:
    """A stage and all that it depends on."""
    found, todo = set(), [name]
    while todo:
        stage = todo.pop()
        if stage not in found:
            found.add(stage)
            todo += plan.graph.stage(stage).inputs.values()
    return found


def _add(ledger: Ledger, work: MethodStage, run: RunSize, student: str, counts: Mapping[str, Any]) -> None:
    cost = work.cost(run)
    if isinstance(work, PretrainBase):
        return  # base models are given, also where the run makes them
    tokens = int(counts.get("tokens", round(cost.tokens)))
    ledger.flop += cost.flop
    if isinstance(work, LearningStage):
        ledger.trained += tokens
        if work.agent.name == student:
            planned = math.ceil(work.num_rows(run) / work.optim.batch) * work.optim.epochs
            ledger.student_steps += int(counts.get("steps", planned))
    elif isinstance(work, Respond):
        ledger.generated += tokens
    elif cost.flop:
        ledger.scored += tokens
