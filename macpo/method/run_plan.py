"""The plan of a run: its stages, where each policy is evaluated, and what every kind of recipe builds stages from."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from macpo.agent_settings import AgentSettings
from macpo.data_settings import SourceSettings, TemplateArguments
from macpo.engine.config import ComputeSettings
from macpo.engine.data.template_settings import date_of
from macpo.engine.run.stages import Graph, Stage, StageWork
from macpo.evaluation.summary import Role
from macpo.method.base_models import DataInputs, PretrainBase
from macpo.method.identities import Identities
from macpo.method.policies import PolicySource, StageAgent

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
    development: dict[str, StageName] = field(default_factory=dict)
    """Teacher -> the stage that evaluates its initial policy on the development prompts."""
    negatives: dict[tuple[str, str], StageName | None] = field(default_factory=dict)
    scores: dict[StageName, dict[str, StageName]] = field(default_factory=dict)
    """Evaluation -> scorer -> the stage that scores the evaluation's responses."""
    checks: dict[str, StageName] = field(default_factory=dict)
    """Scorer -> the stage that compares it with people."""
    identities: Identities = field(default_factory=Identities)


def derived_seed(seed: int, agent: str, purpose: str) -> int:
    """A 31-bit seed that is a function of its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{agent}/{purpose}".encode()).digest()[:4], "big") >> 1


def pretrains(agents: Iterable[AgentSettings]) -> bool:
    """Whether the run pretrains an agent on what the data leaves over."""
    return any(agent.init is not None and agent.init.corpus == "data" for agent in agents)


class RecipeLike(Protocol):
    """What the stages of every kind of recipe are built from."""

    @property
    def seed(self) -> int: ...
    @property
    def template(self) -> str: ...
    @property
    def template_arguments(self) -> TemplateArguments: ...
    @property
    def template_date(self) -> datetime.date: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def data(self) -> SourceSettings: ...
    @property
    def compute(self) -> ComputeSettings: ...


class Builder:
    """Adds the stages of one recipe to a plan; `arm` is empty for the main run. What every kind of recipe shares."""

    data: StageName

    def __init__(self, recipe: RecipeLike, plan: Plan, arm: str = "") -> None:
        self.plan, self.arm = plan, arm
        self._shared = recipe
        self.compute = recipe.compute

    def base(self, agent: AgentSettings) -> StageName | None:
        """The stage that trains the agent's base model; None where the recipe names a folder."""
        init = agent.init
        if init is None:
            return None
        work = PretrainBase(
            init=init,
            corpus=self.plan.identities.of_data(init.corpus) if init.corpus != "data" else None,
            role=self.role(agent),
            template=self.template(agent),
            special_text=self._shared.data.special_text,
            refused=self._shared.data.refused,
            template_arguments=self.template_arguments(agent),
            template_date=date_of(self.template(agent), None, self._shared.template_date),
            seed=self.seed(agent, "base"),
            inputs=DataInputs(data=self.data),
            compute=self.compute,
        )
        return self.add(f"base-{agent.name}", work)

    def role(self, agent: AgentSettings) -> Role:
        """Whose documents the agent's base model is pretrained on, where the run trains it."""
        return "student"

    def template(self, agent: AgentSettings) -> str:
        """The agent's template: a name, or the text of a file, so that keys change with it."""
        return self.plan.identities.template(agent.template or self._shared.template)

    def template_arguments(self, agent: AgentSettings) -> TemplateArguments:
        own = agent.template_arguments
        return self._shared.template_arguments if own is None else own

    def seed(self, agent: AgentSettings, purpose: str) -> int:
        """A seed of its own for every agent and purpose, the same in every arm."""
        return derived_seed(self._shared.seed, agent.name, purpose)

    def policy(self, agent: AgentSettings, ready: str | None = None) -> PolicySource:
        """One of the agent's policies; `ready`: the folder of one that the recipe names."""
        return PolicySource(
            agent=self.stage_agent(agent),
            dtype=self.compute.dtype,
            weights=self.fingerprints(agent.model or (agent.positive if agent.init is None else None), ready),
            ready=ready or None,
        )

    def stage_agent(self, agent: AgentSettings) -> StageAgent:
        """What the stages of an agent need to know of it."""
        recipe, named = self._shared, agent.model or agent.positive
        return StageAgent(
            name=agent.name,
            model=named or (f"base-{agent.name}" if agent.has_tokenizer else None),
            template=self.template(agent),
            template_arguments=self.template_arguments(agent),
            template_date=date_of(self.template(agent), named, recipe.template_date),
            eos_token=agent.eos_token,
            special_text=recipe.data.special_text,
            context_tokens=recipe.context_tokens,
            max_prompt_tokens=recipe.max_prompt_tokens,
            long_prompt=recipe.data.long_prompt,
            refused=recipe.data.refused,
            trust_remote_code=recipe.trust_remote_code,
        )

    def fingerprints(self, *paths: str | None) -> dict[str, str]:
        """Identity of each model folder or Hub id that is named."""
        return {path: self.plan.identities.of_model(path) for path in filter(None, paths)}

    def add(self, name: str, work: StageWork) -> StageName:
        return self.plan.graph.add(Stage(f"{self.arm}.{name}" if self.arm else name, work))
