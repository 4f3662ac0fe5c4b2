"""The methods by name, and the plan of a recipe: the stages of its own method and of every further arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from macpo.config import MethodName, Recipe
from macpo.engine.errors import ConfigError
from macpo.iteration import macpo
from macpo.method.identities import Identities
from macpo.method.run_plan import Plan
from macpo.method.steps import Steps
from macpo.methods.annotator import annotator
from macpo.methods.confidence import confidence
from macpo.methods.filtered import filtered
from macpo.methods.naive import naive
from macpo.methods.positives import positives
from macpo.methods.rewarding import rewarding
from macpo.methods.rlaif import rlaif
from macpo.methods.rlcd import rlcd
from macpo.methods.spin import spin


@dataclass(frozen=True, slots=True)
class Method:
    """How a method adds its stages to a plan."""

    build: Callable[[Steps], None]
    asks: bool = False
    """Whether a model is told in words what to do, which the models of the demo world do not understand."""
    scores: bool = False
    """Whether the teachers' log-probs decide, which no server gives."""

    def why_not(self, recipe: Recipe) -> str:
        """Why the method cannot run on a recipe's data and teachers; empty where it can."""
        if self.asks and recipe.data.world is not None:
            return "it asks a model in words, which the demo world's models do not understand"
        served = [teacher.name for teacher in recipe.active_teachers if teacher.served is not None]
        if self.scores and served:
            return f"it needs log-probs of the teachers, and {served[0]} is served"
        return ""


METHODS: dict[MethodName, Method] = {
    "macpo": Method(macpo),
    "naive-sft": Method(naive),
    "filtered-sft-iterated": Method(filtered),
    "sft-positives": Method(positives),
    "confidence-loss": Method(confidence),
    "spin": Method(spin),
    "self-rewarding": Method(rewarding, asks=True),
    "rlaif": Method(rlaif, asks=True, scores=True),
    "rlcd": Method(rlcd, asks=True),
    "weak-annotator": Method(annotator, scores=True),
}


def build_plan(recipe: Recipe, identities: Identities | None = None) -> Plan:
    """The stages of the main arm and of every ablation; equal stages are shared.

    `identities`: of the files that the recipe names, looked at here by default.
    """
    plan = Plan(identities=identities or Identities())
    _add(recipe, plan, "")
    if recipe.evaluation.ceiling:
        Steps(recipe, plan, "").ceiling()
    for arm in recipe.ablations:
        _add(recipe.arm(arm), plan, arm)
    return plan


def _add(recipe: Recipe, plan: Plan, arm: str) -> None:
    method = METHODS[recipe.method]
    if why := method.why_not(recipe):
        field = f"ablations.{arm}.method" if arm else "method"
        raise ConfigError(f"{recipe.method} cannot run here: {why}", "leave it out", field=field)
    method.build(Steps(recipe, plan, arm))
