"""Recipes that train one model: `recipe: sft`, `recipe: preference` and `recipe: reward`."""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from macpo.agent_settings import AgentSettings
from macpo.config import check_reference
from macpo.data_settings import SourceSettings, TemplateArguments
from macpo.engine.config import (
    ComputeSettings,
    InitSettings,
    LoraSettings,
    OptimSettings,
    PositiveInt,
    PreferenceSettings,
    RewardSettings,
    SamplingSettings,
    Settings,
    Tuning,
    sft_weight_default,
)
from macpo.engine.data.template_settings import DATE
from macpo.engine.data.templates import Template
from macpo.engine.paths import LocalPath, OptionalHubPath
from macpo.scorer_settings import check_reward

_FORMER = {"generation_batch": 64, "wave_requests": 256}
"""Defaults before `auto`, which recipes of earlier runs have written out."""
NAME = "policy"
"""How the one agent of these recipes is called in folders and reports."""


class HeldOutSettings(SourceSettings):
    """Training data, and what is held out of it for evaluation; no prompt is in both."""

    most_test_prompts: ClassVar[int] = 200

    train_prompts: PositiveInt | None = None
    """Distinct prompts to train on; default all that are not held out."""


class PairData(HeldOutSettings):
    """Preference pairs."""

    format: Literal["auto", "hh", "pku", "pairs", "alpaca", "sharegpt"] = "auto"
    """Layout of the rows (macpo/data/preferences.py); `auto` goes by the keys of the first row."""


class RewardData(PairData):
    """Preference pairs for a reward model."""

    margin: str | None = None
    """Column with the number by which the chosen response is better: target of the rewards' difference; default 0."""


class ExampleData(HeldOutSettings):
    """Prompts with one response each."""

    format: Literal["auto", "messages", "response", "alpaca", "sharegpt", "chosen", "rejected"] = "auto"
    """Layout of the rows (macpo/data/examples.py); `chosen` and `rejected` take that side of preference pairs."""


class StandaloneRecipe(Settings):
    """One policy, trained in one stage and evaluated before and after."""

    recipe: Literal["sft", "preference", "reward"]
    """Kind of recipe."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides the held-out prompts, the order of training and initial adapter weights."""
    output: LocalPath = Field("runs/training", validate_default=True)
    """The run's folder."""
    data: PairData | ExampleData
    model: OptionalHubPath | None = None
    """The model to train: a folder or a Hub id with safetensors weights."""
    init: InitSettings | None = None
    """Instead of `model`: build a small Llama and pretrain it here, on the prompts that the data leaves over."""
    adapter: OptionalHubPath | None = None
    """A peft adapter of `model` that training goes on from."""
    tuning: Tuning = LoraSettings()
    """Low-rank adapters or all weights."""
    template: Template = "auto"
    """Chat template: `auto` (the tokenizer's own, else vicuna), `vicuna`, `vicuna-system`, `alpaca`, `chatml`, `plain`,
    or a jinja file."""
    template_arguments: TemplateArguments = Field(default_factory=dict)
    """What the template reads besides the dialogue, such as {enable_thinking: false}; unknown names are refused."""
    template_date: datetime.date = DATE
    """The day that a template writes which writes a date: one for the whole run, and for the exported template."""
    eos_token: str | None = None
    """End-of-response token for tokenizers that name none."""
    context_tokens: PositiveInt = 1024
    """Longest prompt and response together; a longer response is cut."""
    prompt_tokens: PositiveInt | None = None
    """Longest prompt, see `data.long_prompt`; default half of context_tokens."""
    compute: ComputeSettings = ComputeSettings()
    trust_remote_code: bool = False
    """Run code that a model folder brings along."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model is None and self.init is None:
            raise ValueError("model is missing: there are no weights Fix: give a folder or Hub id, or an `init` block")
        if self.model is not None and self.init is not None:
            raise ValueError("model and `init` are two base models Fix: keep one of them")
        if self.adapter is not None and self.model is None:
            raise ValueError("adapter belongs to `model` Fix: name its base there")
        if self.max_prompt_tokens >= self.context_tokens:
            raise ValueError(
                f"prompt_tokens ({self.max_prompt_tokens}) leaves no room for a response in context_tokens "
                f"({self.context_tokens})"
            )
        for name, former in _FORMER.items():
            if not self.generates and getattr(self.compute, name) not in (
                former,
                ComputeSettings.model_fields[name].default,
            ):
                what = f"is for generation, and this recipe generates nothing Fix: {self._to_generate}"
                raise ValueError(f"compute.{name} {what}")
        if self.init is not None and self.init.context < self.context_tokens:
            raise ValueError(f"context_tokens ({self.context_tokens}) is beyond init.context ({self.init.context})")
        return self

    _to_generate: ClassVar[str] = "leave it out"

    @property
    def generates(self) -> bool:
        """Whether the policy writes responses to the held-out prompts."""
        return False

    @property
    def agents(self) -> tuple[AgentSettings, ...]:
        """The policy as the method's stages know it."""
        agent = AgentSettings(
            name=NAME,
            model=self.model,
            init=self.init,
            positive=self.adapter,
            tuning=self.tuning,
            eos_token=self.eos_token,
        )
        return (agent,)

    @property
    def max_prompt_tokens(self) -> int:
        """Room that a prompt has, whatever its responses are."""
        return self.prompt_tokens or self.context_tokens // 2

    @property
    def prompt_limit(self) -> str:
        """Where `max_prompt_tokens` comes from, for messages."""
        return "half of context_tokens" if self.prompt_tokens is None else "prompt_tokens"


class PolicyRecipe(StandaloneRecipe):
    """One policy that can write responses."""

    _to_generate: ClassVar[str] = "leave it out, or say in `sampling` how responses are drawn"

    sampling: SamplingSettings | None = None
    """How responses to the held-out prompts are drawn, before and after training; default none are. `{}` takes the
    defaults. They can be asked for later: what is finished stays."""

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.sampling is not None and self.max_prompt_tokens + self.sampling.max_new_tokens > self.context_tokens:
            raise ValueError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) after a prompt of {self.max_prompt_tokens} "
                f"tokens is beyond context_tokens ({self.context_tokens}) Fix: lower it or prompt_tokens"
            )
        return self

    @property
    def generates(self) -> bool:
        return self.sampling is not None


class SftRecipe(PolicyRecipe):
    """Supervised fine-tuning of one policy."""

    recipe: Literal["sft"] = "sft"
    """Kind of recipe."""
    output: LocalPath = Field("runs/sft", validate_default=True)
    """The run's folder."""
    data: ExampleData
    training: OptimSettings = OptimSettings(learning_rate=5e-5)
    """Mean NLL of the responses' tokens over each batch."""


class PolicyPreferenceSettings(PreferenceSettings):
    """As in a MACPO recipe, but without the SFT term unless it is asked for."""

    sft_weight: Annotated[float, Field(ge=0)] = Field(default_factory=lambda data: sft_weight_default(data, 0.0))
    """Weight of the mean token NLL of the chosen response; default 0, for orpo 1."""


class PreferenceRecipe(PolicyRecipe):
    """Preference training of one policy."""

    recipe: Literal["preference"] = "preference"
    """Kind of recipe."""
    output: LocalPath = Field("runs/preference", validate_default=True)
    """The run's folder."""
    data: PairData
    training: PolicyPreferenceSettings = PolicyPreferenceSettings()
    """The loss and how it is minimised."""

    @model_validator(mode="after")
    def _has_adapter(self) -> Self:
        check_reference("training.", self.training, self.agents)
        return self


class RewardRecipe(StandaloneRecipe):
    """Training of one reward model."""

    recipe: Literal["reward"] = "reward"
    """Kind of recipe."""
    output: LocalPath = Field("runs/reward", validate_default=True)
    """The run's folder."""
    data: RewardData
    training: RewardSettings = RewardSettings()
    """The loss and how it is minimised."""

    @model_validator(mode="after")
    def _has_score_head(self) -> Self:
        check_reward(self.tuning, self.compute)
        return self


Standalone: TypeAlias = SftRecipe | PreferenceRecipe | RewardRecipe
