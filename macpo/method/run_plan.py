"""TODO."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from macpo.config import AgentSettings, Recipe
from macpo.data.rows import fingerprint
from macpo.engine.config import PreferenceSettings
from macpo.engine.models.loading import fingerprint_model
from macpo.engine.run.stages import Graph, Stage
from macpo.evaluation.summary import Role
from macpo.method import base_models, heldout, learning
from macpo.standalone.config import StandaloneRecipe

COSTS = {base_models.pretrain_base: 30.0, learning.imitate: 3.0, learning.prefer: 4.0, heldout.evaluate_policy: 2.0}
"""Relative durations, for the order in which parallel jobs take stages."""


StageName = str


Policies = dict[str, StageName | None]  # agent -> stage that made its policy; None = the ready one of the recipe


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one iteration, and the stage that evaluates it."""

    arm: str
    agent: str
    role: Role
    iteration: int
    policy: StageName | None
    evaluation: StageName


@dataclass(slots=True)
class Plan:
    """A run: its stages, and where each agent's policy of each iteration is evaluated."""

    graph: Graph = field(default_factory=Graph)
    points: list[Point] = field(default_factory=list)
    negatives: dict[tuple[str, str], StageName | None] = field(default_factory=dict)


def derived_seed(seed: int, agent: str, purpose: str) -> int:
    """A 31-bit seed that is a function of its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{agent}/{purpose}".encode()).digest()[:4], "big") >> 1


class Builder:
    """Adds the stages of one recipe to a plan; `arm` is empty for the main run. What every kind of recipe shares."""

    data: StageName

    def __init__(self, recipe: Recipe | StandaloneRecipe, plan: Plan, arm: str = "") -> None:
        self.plan, self.arm = plan, arm
        self._shared = recipe
        self._fingerprints: dict[str, str] = {}

    def base(self, agent: AgentSettings) -> dict[str, StageName]:
        """The inputs by which a stage reaches the agent's base model; none where the recipe names a folder."""
        if agent.init is None:
            return {}
        settings = {
            "init": agent.init.model_dump(mode="json"),
            "corpus": fingerprint(agent.init.corpus) if agent.init.corpus != "data" else None,
            "role": self.role(agent),
            "template": self.template(agent),
            "special_text": self._shared.data.special_text,
            "seed": self.seed(agent, "base"),
        }
        return {
            "base": self.add(
                f"base-{agent.name}", self.compute(base_models.pretrain_base), settings, {"data": self.data}
            )
        }

    def role(self, agent: AgentSettings) -> Role:
        """Whose documents the agent's base model is pretrained on, where it is made here."""
        return "student"

    def template(self, agent: AgentSettings) -> str:
        return agent.template or self._shared.template

    def seed(self, agent: AgentSettings, purpose: str) -> int:
        """A seed of its own for every agent and purpose, the same in every arm."""
        return derived_seed(self._shared.seed, agent.name, purpose)

    def policy_settings(self, agent: AgentSettings, ready: str | None = None) -> dict[str, Any]:
        """What every stage depends on that loads one of the agent's policies."""
        recipe = self._shared
        settings: dict[str, Any] = {
            "agent": {
                "name": agent.name,
                "model": agent.model or agent.positive or (f"base-{agent.name}" if agent.has_tokenizer else None),
                "template": self.template(agent),
                "eos_token": agent.eos_token,
                "special_text": recipe.data.special_text,
                "context_tokens": recipe.context_tokens,
                "max_prompt_tokens": recipe.max_prompt_tokens,
                "long_prompt": recipe.data.long_prompt,
                "trust_remote_code": recipe.trust_remote_code,
            },
            "dtype": recipe.compute.dtype,
        }
        paths = [agent.model or (agent.positive if agent.init is None else None), ready]
        settings["weights"] = self.fingerprints(*paths)
        return settings | ({"ready": ready} if ready else {})

    def reference_settings(self, agent: AgentSettings, training: PreferenceSettings) -> dict[str, Any]:
        """What the reference log-probs depend on besides `policy_settings`."""
        return {
            "tuning": agent.tuning.model_dump(mode="json"),
            "reference_weights": self.fingerprints(training.reference_model),
        }

    def fingerprints(self, *paths: str | None) -> dict[str, str]:
        """Identity of each model folder or Hub id that is named."""
        for path in filter(None, paths):
            if path not in self._fingerprints:  # reading a large model once is enough
                self._fingerprints[path] = fingerprint_model(path)
        return {path: self._fingerprints[path] for path in filter(None, paths)}

    def compute(self, function: Callable[..., None], **where: Any) -> Callable[..., None]:
        """Bind where a stage runs; not part of its key."""
        return functools.partial(function, self._shared.compute, **where)

    def add(
        self, name: str, run: Callable[..., None], settings: Mapping[str, Any], inputs: Mapping[str, StageName]
    ) -> StageName:
        full_name = f"{self.arm}.{name}" if self.arm else name
        function = getattr(run, "func", run)  # what a partial binds says where the stage runs, not what it does
        return self.plan.graph.add(Stage(full_name, function.__name__, run, settings, inputs, COSTS.get(function, 1.0)))
