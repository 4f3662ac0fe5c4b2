"""What the scorers of a run found, for its summary."""

from __future__ import annotations

from typing import Any

from macpo.evaluation.agreement import in_words, may_be_headline
from macpo.evaluation.summary import score_metric
from macpo.method.run_plan import Plan
from macpo.method.scoring.stages import AGREEMENT, SCORES
from macpo.recipe_kinds import AnyRecipe
from macpo.report.run_reader import RunReader, read_object
from macpo.standalone.config import RewardRecipe


def scored(plan: Plan, folder: RunReader, evaluation: str) -> dict[str, Any]:
    """The mean score of an evaluation's responses by each scorer, with its standard error."""
    paths = {stage.name: stage.path for stage in folder.stages}
    found: dict[str, Any] = {}
    for name, stage in plan.scores.get(evaluation, {}).items():
        told = read_object(paths[stage] / SCORES)
        found |= {score_metric(name): told["mean"], f"{score_metric(name)}_se": told["se"]}
    return found


def judged_by(recipe: AnyRecipe, plan: Plan, folder: RunReader) -> dict[str, Any]:
    """`scorers` of a summary, each with its agreement with people, and `warnings` about what may not be the headline.

    The demo world's rules are compared with nobody: they are exact.
    """
    paths = {stage.name: stage.path for stage in folder.stages}
    scorers: dict[str, Any] = {}
    warnings = []
    for name in dict.fromkeys(name for scores in plan.scores.values() for name in scores):
        scorers[name] = {"headline": True}
        if name in plan.checks:
            found = read_object(paths[plan.checks[name]] / AGREEMENT)
            scorers[name] = {"headline": may_be_headline(found), **found}
            if not may_be_headline(found):
                warnings.append(in_words(f"The scorer {name}", found))
    if isinstance(recipe, RewardRecipe):
        for point in plan.points:
            found = read_object(paths[point.evaluation] / "evaluation.json")
            warnings += [] if may_be_headline(found) else [in_words("The reward model", found)]
    return {key: value for key, value in (("scorers", scorers), ("warnings", warnings)) if value}
