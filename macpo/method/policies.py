"""One of an agent's policies as a stage uses it: where its weights lie, its tokenizer and its template.

A policy is a folder `policy/` of the stage that made it: a peft adapter, or a whole Hugging Face model.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from macpo.engine.config import ComputeSettings, Tuning
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.model_folders import PolicyRef, is_adapter, local_folder
from macpo.engine.run.context import StageContext
from macpo.engine.run.keys import UNKNOWN, is_unknown
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import Cost, MethodStage, RunSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from macpo.engine.models.model_cache import ModelCache
    from macpo.engine.models.policy import PolicyModule


class StageAgent(BaseModel):
    """What a stage needs to know of an agent: its base model, and how text becomes its tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str | None
    """Folder or Hub id, or what a base model that the run makes is called; None for a server's alone."""
    template: str
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    template_date: datetime.date | None = None
    """The date that its prompts hold; None where they hold none."""
    eos_token: str | None
    special_text: Literal["plain", "error"]
    context_tokens: int
    max_prompt_tokens: int
    long_prompt: Literal["truncate", "drop", "error"]
    trust_remote_code: bool
    refused: Literal["error", "drop"] = "error"
    """What becomes of a row that the template refuses; keys leave the default out."""


class PolicySource(BaseModel):
    """What every stage depends on that opens one of an agent's policies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    agent: StageAgent
    dtype: str
    weights: dict[str, str]
    """Identity of each model folder or Hub id that the stage may read."""
    ready: str | None = None
    """Folder or Hub id of an already trained policy that the recipe names."""


class PolicyInputs(StageInputs):
    base: str | None = None
    """Made the agent's base model; None where the recipe names one."""
    policy: str | None = None
    """Trained the policy that the stage starts from; None for a ready one, or the bare base model."""


class PolicyDataInputs(PolicyInputs):
    data: str
    """Wrote the run's sets of prompts."""


class PolicyStage(MethodStage):
    """A kind of stage that opens one of an agent's policies."""

    policy: PolicySource
    inputs: PolicyInputs = PolicyInputs()
    compute: ComputeSettings = Field(exclude=True)
    """Where the stage runs."""

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        policy: dict[str, Any] = found.pop("policy")
        if self.policy.ready is None:
            del policy["ready"]
        if self.agent.refused == "error":
            del policy["agent"]["refused"]
        for name in ("template_arguments", "template_date"):
            if not policy["agent"][name]:
                del policy["agent"][name]
        if self._is_date_unknown:
            policy["agent"]["template_date"] = UNKNOWN + self.agent.template
        return policy | found

    @property
    def _is_date_unknown(self) -> bool:
        """Whether the template is not here that would say whether prompts hold a date."""
        agent = self.agent
        own = self.policy.weights.get(agent.model or "")
        return is_unknown(agent.template) or (agent.template == "auto" and is_unknown(own))

    @property
    def agent(self) -> StageAgent:
        return self.policy.agent

    def open_policy(self, ctx: StageContext) -> OpenPolicy:
        """The stage's policy; call it once a stage."""
        made = self.inputs.base
        base = str(ctx.input(made) / "model") if made is not None else str(self.agent.model)
        folder = self.policy.ready if self.inputs.policy is None else ctx.input(self.inputs.policy) / "policy"
        ref = PolicyRef(base) if folder is None else policy_ref(base, folder)
        return OpenPolicy(ctx, self.agent, self.compute, base, ref)

    def loads(self, run: RunSize) -> str | None:
        return self.agent.name if self.agent.name in run.shapes else None

    def forward(self, run: RunSize, tokens: float) -> Cost:
        """The cost of one forward over so many tokens."""
        agent = self.loads(run)
        return Cost(tokens, 2 * (run.shapes[agent].num_parameters if agent else 0) * tokens)


def policy_ref(base: str, path: str | Path) -> PolicyRef:
    """The policy in a folder or Hub id: a whole model, or an adapter of the base.

    Raises:
        ConfigError: not found.
    """
    return PolicyRef(base, str(path)) if is_adapter(local_folder(path, kind="policy")) else PolicyRef(str(path))


READING = ("template", "template_arguments", "template_date", "special_text", "eos_token", "trust_remote_code")
"""What decides how an agent reads text, besides its tokenizer."""


def chat_with(agent: StageAgent, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """A tokenizer with the agent's template and its settings."""
    return Chat(
        tokenizer,
        agent.template,
        special_text=agent.special_text,
        eos_token=agent.eos_token,
        arguments=agent.template_arguments,
        date=agent.template_date,
    )


def chat_of(agent: StageAgent, path: str) -> Chat:
    """The tokenizer in a folder or on the Hub, with the agent's template and its settings."""
    return _chat(path, agent.model_dump_json())


@functools.lru_cache(maxsize=16)
def _chat(path: str, dumped: str) -> Chat:
    agent = StageAgent.model_validate_json(dumped)
    return chat_with(agent, load_tokenizer(path, trust_remote_code=agent.trust_remote_code))


@dataclass(frozen=True)
class OpenPolicy:
    """A policy in a running stage; its weights are read when they are asked for."""

    ctx: StageContext
    agent: StageAgent
    compute: ComputeSettings
    base: str
    """Folder or Hub id of the agent's base model."""
    ref: PolicyRef

    @functools.cached_property
    def chat(self) -> Chat:
        """The agent's tokenizer and template."""
        return chat_of(self.agent, self.base)

    def load(
        self,
        tuning: Tuning | None = None,
        ref: PolicyRef | None = None,
        *,
        seed: int = 0,
        made: Callable[[PolicyModule], PolicyModule] | None = None,
    ) -> PolicyModule:
        """The policy (or another one, `ref`), to score with (tuning None) or to train.

        Spread over the ranks as `compute.parallel` says where it trains, or does not fit on one rank.

        Args:
            seed: of a fresh adapter's weights.
            made: makes another module of the whole policy, before it is spread.

        Raises:
            ConfigError: its embedding lacks a row for a token.
        """
        from macpo.engine.generation.vocabulary import check_vocab
        from macpo.engine.models.parallelize import parallelize, spreads

        models, parallel, world = self._models(), self.compute.parallel, self.ctx.world
        ref = ref or self.ref
        spread = (tuning is not None or not models.fits(ref.base)) and spreads(parallel, world)
        policy = models.policy(ref, tuning, seed=seed if tuning is not None else 0, spread=spread)
        check_vocab(policy.base, self.chat.tokenizer)
        policy = policy if made is None else made(policy)
        return parallelize(policy, parallel, world) if spread or tuning is not None else policy

    def load_writer(self) -> PolicyModule:
        """The policy, to generate with: whole where a rank can hold it, else split over the fewest that can.

        Raises:
            ConfigError: its embedding lacks a row for a token.
            ResourceError: no number of ranks can hold it.
        """
        from macpo.engine.generation.split_model import split_policy, team_size
        from macpo.engine.generation.vocabulary import check_vocab

        models, world = self._models(), self.ctx.world
        shared = world.size > 1 and not models.fits(self.ref.base)
        policy = models.policy(self.ref, spread=shared)
        check_vocab(policy.base, self.chat.tokenizer)
        if not shared:
            return policy
        ranks = team_size(policy, lambda ranks: models.fits(self.ref.base, ranks), world)
        models.make_room(self.ref.base, ranks)
        return split_policy(policy, world, ranks)

    def _models(self) -> ModelCache:
        """The process's cache, without whole models of this run that no stage reads any more."""
        from macpo.engine.models.compute import model_cache

        models = model_cache(self.compute, self.agent.trust_remote_code)
        if self.ctx.needed is not None:
            models.keep(self.ctx.dir.parent, self.ctx.needed)
        return models
