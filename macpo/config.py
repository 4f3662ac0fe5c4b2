"""The recipe: everything a run depends on, in one closed pydantic model."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from macpo.agent_settings import AgentSettings
from macpo.data_settings import DataSettings, TemplateArguments
from macpo.engine import recipe as recipes
from macpo.engine.config import (
    ComputeSettings,
    LoraSettings,
    Name,
    OptimSettings,
    PositiveInt,
    PreferenceSettings,
    SamplingSettings,
    Settings,
)
from macpo.engine.data.template_settings import DATE
from macpo.engine.data.templates import Template
from macpo.engine.errors import ConfigError
from macpo.engine.paths import LocalPath
from macpo.judging.settings import JudgeSettings, distinct
from macpo.scorer_settings import ScorerSettings, check_reward

MethodName = Literal[
    "macpo",
    "naive-sft",
    "filtered-sft-iterated",
    "sft-positives",
    "confidence-loss",
    "spin",
    "self-rewarding",
    "rlaif",
    "rlcd",
    "weak-annotator",
]


_OF_THE_LOOP = ("mutual_learning", "positives", "negatives")
"""Settings of a recipe that MACPO's loop alone reads."""


class TrainingSettings(Settings):
    """How the agents of one role are trained."""

    positive: OptimSettings = OptimSettings(learning_rate=5e-5, epochs=3)
    """Initial positive policy: SFT on better responses."""
    negative: OptimSettings = OptimSettings(learning_rate=5e-5, epochs=1)
    """Initial negative policy: SFT on worse responses, from the positive weights."""
    preference: PreferenceSettings = PreferenceSettings()
    """Contrastive preference optimisation in each iteration."""


class InitialSettings(Settings):
    """How the student gets its first labels."""

    weak_label: str = "random"
    """`random` (a seeded random teacher a prompt), `min-perplexity` (under the student's base) or a teacher's name."""


class PositiveSettings(Settings):
    """Mutual positive behaviour augmentation and its ablations."""

    source: Literal["mutual", "own"] = "mutual"
    """`mutual`: responses of other agents; `own`: the agent's own samples."""
    selection: Literal["min-perplexity", "random", "max-perplexity"] = "min-perplexity"
    """Which teacher's response the student keeps, by its own perplexity."""
    cross_fit: bool = False
    """In the first iteration, score each half of the prompts by a student that learnt from the labels of the other:
    a student prefers the labels it was trained on."""

    @model_validator(mode="after")
    def _has_a_filter(self) -> PositiveSettings:
        if self.cross_fit and (self.source == "own" or self.selection == "random"):
            raise ValueError("cross_fit is for a choice by perplexity among other agents' responses Fix: leave it out")
        return self


class NegativeSettings(Settings):
    """Hard negative behaviour construction and its ablations."""

    source: Literal["own", "other", "previous-positive"] = "own"
    """`own` negative policy; an `other` agent's (a random teacher's for the student, the student's for a teacher);
    or the agent's `previous-positive` sample."""
    refresh: bool = False
    """Draw new negative responses in every iteration."""


class EvaluationSettings(Settings):
    """What is measured on the test prompts after every iteration."""

    ceiling: bool = True
    """Also train the student on the human responses of the student half."""
    sampling: SamplingSettings | None = None
    """How test responses are drawn; defaults to the recipe's `sampling`."""
    scorers: tuple[ScorerSettings, ...] = ()
    """What scores the responses besides what every run measures; the first that may be is the headline, after gold."""
    judges: tuple[JudgeSettings, ...] = ()
    """Language models that `macpo evaluate RUN --judge NAME` asks to compare responses; no stage depends on them."""
    opponents: tuple[str, ...] = ()
    """Whose responses the judged policy's are compared with: student@0, ceiling, teacher-best@0, ARM.student@2 (a name
    alone is its last iteration); default the student's iteration 0, every teacher's last, and the ceiling."""

    @field_validator("scorers")
    @classmethod
    def _distinct(cls, scorers: tuple[ScorerSettings, ...]) -> tuple[ScorerSettings, ...]:
        names = [scorer.name for scorer in scorers]
        if len(set(names)) != len(names):
            raise ValueError(f"scorers need distinct names; got {', '.join(names)} Fix: rename one of them")
        return scorers

    @model_validator(mode="after")
    def _distinct_judges(self) -> EvaluationSettings:
        distinct(self.judges)
        return self


class Recipe(Settings):
    """A run of MACPO (arXiv 2410.07672)."""

    recipe: Literal["macpo"] = "macpo"
    """Kind of recipe; `sft`, `preference` and `reward` are in macpo/standalone/config.py."""
    method: MethodName = "macpo"
    """How the student learns from the teachers; all but `macpo` are baselines, in macpo/methods."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides splits, orders, initial weights and sampling noise."""
    output: LocalPath = Field("runs/macpo", validate_default=True)
    """The run's folder."""
    data: DataSettings
    template: Template = "auto"
    """Chat template: `auto` (the tokenizer's own, else vicuna), `vicuna`, `vicuna-system`, `alpaca`, `chatml`, `plain`,
    or a jinja file."""
    template_arguments: TemplateArguments = Field(default_factory=dict)
    """What the templates read besides the dialogue, such as {enable_thinking: false}; unknown names are refused."""
    template_date: datetime.date = DATE
    """The day that templates write which write a date: one for the whole run, and for the exported template."""
    context_tokens: PositiveInt = 1024
    """Longest prompt and response together."""
    teachers: Annotated[tuple[AgentSettings, ...], Field(min_length=1)]
    student: AgentSettings
    use_teachers: tuple[str, ...] | None = None
    """Names of the teachers that take part; default all."""
    iterations: Annotated[int, Field(ge=0)] = 3
    """T: rounds of student, then teachers."""
    mutual_learning: bool = True
    """Whether the teachers learn from the student."""
    initial: InitialSettings = InitialSettings()
    positives: PositiveSettings = PositiveSettings()
    negatives: NegativeSettings = NegativeSettings()
    teacher_training: TrainingSettings = TrainingSettings()
    student_training: TrainingSettings = TrainingSettings()
    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    ablations: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Further arms of the run: name -> overrides by dotted path; equal stages are shared with the main arm."""
    compute: ComputeSettings = ComputeSettings()
    trust_remote_code: bool = False
    """Run code that a model folder brings along."""

    @field_validator("teachers")
    @classmethod
    def _name_teachers(cls, teachers: tuple[AgentSettings, ...]) -> tuple[AgentSettings, ...]:
        return tuple(t if t.name else t.model_copy(update={"name": f"teacher{k}"}) for k, t in enumerate(teachers))

    @field_validator("student")
    @classmethod
    def _name_student(cls, student: AgentSettings) -> AgentSettings:
        return student if student.name else student.model_copy(update={"name": "student"})

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [agent.name for agent in (*self.teachers, self.student)]
        if len(set(names)) != len(names) or {"ceiling", "base"} & set(names):
            fix = "Fix: change the `name` of one of them"
            raise ValueError(f"agents need distinct names other than ceiling and base; got {', '.join(names)} {fix}")
        teachers = {teacher.name for teacher in self.teachers}
        if self.use_teachers is not None and (not self.use_teachers or set(self.use_teachers) - teachers):
            fix = f"Fix: use some of {', '.join(sorted(teachers))}"
            raise ValueError(f"use_teachers must name teachers; got {', '.join(self.use_teachers) or 'none'} {fix}")
        self._check_method()
        if self.student.served is not None:
            raise ValueError("student.served is for teachers alone: the student learns Fix: leave it out")
        if self.student.data is not None:
            raise ValueError("student.data is not read: the student learns from the teachers alone Fix: leave it out")
        if self.data.world is not None and any(teacher.data is not None for teacher in self.teachers):
            raise ValueError("teachers.data is for data.path; the world makes every teacher's labels Fix: leave it out")
        labels = {"random", "min-perplexity", *(teacher.name for teacher in self.active_teachers)}
        if self.initial.weak_label not in labels:
            fix = f"Fix: use {', '.join(sorted(labels))}"
            raise ValueError(f"initial.weak_label cannot be {self.initial.weak_label!r} {fix}")
        if self.sampling.max_new_tokens >= self.context_tokens:
            raise ValueError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a prompt in "
                f"context_tokens ({self.context_tokens})"
            )
        if self.student.init is None and self.student.model is None and self.initial_needs_base:
            raise ValueError("student.model is missing: only teachers may be all ready Fix: give it `model` or `init`")
        self._check_scorers()
        for role, agents in (("teacher", self.teachers), ("student", (self.student,))):
            check_reference(f"{role}_training.preference.", getattr(self, f"{role}_training").preference, agents)
        for arm, overrides in self.ablations.items():
            if "ablations" in overrides or "compute" in {re.split(r"\.", key)[0] for key in overrides}:
                raise ValueError(f"ablations.{arm} may not change `ablations` or `compute` Fix: leave them out")
            if any(key.startswith("evaluation.scorers") for key in overrides):
                why = "arms are compared by the same Fix: leave them out"
                raise ValueError(f"ablations.{arm} may not change `evaluation.scorers`: {why}")
        return self

    def _check_scorers(self) -> None:
        for scorer in self.evaluation.scorers:
            where = f"evaluation.scorers ({scorer.name}): "
            if scorer.kind == "gold" and self.data.world is None:
                raise ValueError(f"{where}gold is for data.world Fix: name a reward model, or leave it out")
            if scorer.training is not None:
                if not self.data.reward_prompts:
                    fix = "set data.reward_prompts to the number of prompts to train it on"
                    raise ValueError(f"{where}train needs human pairs that no agent sees Fix: {fix}")
                check_reward(scorer.training.tuning, self.compute)
        trained = any(scorer.training is not None for scorer in self.evaluation.scorers)
        if self.data.reward_prompts and not trained:
            fix = "add a scorer with reward: {train: {}} to evaluation.scorers, or leave it out"
            raise ValueError(f"data.reward_prompts is read by no scorer Fix: {fix}")

    def _check_method(self) -> None:
        """Raises ValueError for a setting that the method does not read."""
        if self.method not in ("macpo", "sft-positives"):
            for name in _OF_THE_LOOP:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is not read: it belongs to the method macpo Fix: leave {name} out")
        if self.method in ("naive-sft", "confidence-loss") and self.iterations:
            raise ValueError(f"iterations must be 0: {self.method} has no rounds Fix: set iterations: 0")
        if self.method in ("filtered-sft-iterated", "confidence-loss") and self.student.positive is not None:
            why = f"{self.method} trains the student from its base Fix: leave it out"
            raise ValueError(f"student.positive is not read: {why}")

    @property
    def agents(self) -> tuple[AgentSettings, ...]:
        """Every agent, the student last."""
        return (*self.teachers, self.student)

    @property
    def max_prompt_tokens(self) -> int:
        """Room that a prompt has, whatever its responses are."""
        return self.context_tokens - self.sampling.max_new_tokens

    @property
    def prompt_limit(self) -> str:
        """Where `max_prompt_tokens` comes from, for messages."""
        return "context_tokens less sampling.max_new_tokens"

    @property
    def active_teachers(self) -> tuple[AgentSettings, ...]:
        """The teachers that take part."""
        return tuple(t for t in self.teachers if self.use_teachers is None or t.name in self.use_teachers)

    @property
    def initial_needs_base(self) -> bool:
        """Whether some stage starts from the student's base model."""
        return self.student.positive is None or self.evaluation.ceiling or self.initial.weak_label == "min-perplexity"

    def arm(self, name: str, *, base: Path | None = None) -> Recipe:
        """The recipe of one ablation: this one under the arm's overrides. Raises ConfigError for what does not fit.

        `base`: the folder that relative paths of the overrides are relative to; default the working folder.
        """
        plain = self.model_copy(update={"ablations": {}})
        if self.ablations[name].get("method", self.method) != self.method:  # another method has no use for these
            defaults = {each: type(self).model_fields[each].default for each in _OF_THE_LOOP}
            plain = plain.model_copy(update=defaults)
        overrides = [f"{path}={json.dumps(value)}" for path, value in self.ablations[name].items()]
        try:
            return recipes.loads(recipes.dump(plain), Recipe, overrides, file=f"ablations.{name}", base=base)
        except ConfigError as error:
            where = f"ablations.{name}"
            raise ConfigError(
                problems=[replace(p, file="", line=None, field=f"{where}.{p.field}") for p in error.problems]
            ) from None

    def with_resolved_arms(self, *, base: Path | None = None) -> Recipe:
        """This recipe with the paths in its arms' overrides resolved as its own are. Raises ConfigError as `arm`."""
        if not self.ablations:
            return self
        resolved: dict[str, dict[str, Any]] = {}
        for name, overrides in self.ablations.items():
            arm = self.arm(name, base=base)
            found = {path: _at(arm, path.split(".")) for path in overrides}
            resolved[name] = {path: _as_resolved(value, found[path]) for path, value in overrides.items()}
        return self.model_copy(update={"ablations": resolved})


def _at(block: Any, path: list[str]) -> Any:
    """The value at a dotted path of a validated recipe."""
    for part in path:
        if isinstance(block, tuple):
            block = block[int(part)]
        else:
            block = block[part] if isinstance(block, dict) else getattr(block, part)
    return block


def _as_resolved(written: Any, found: Any) -> Any:
    """What was written, its texts as validation left them; `found` also has what was not written."""
    if isinstance(written, dict):
        inside = found if isinstance(found, dict) else vars(found)
        return {key: _as_resolved(value, inside[key]) for key, value in written.items()}
    if isinstance(written, list):
        return [_as_resolved(one, two) for one, two in zip(written, found, strict=True)]
    return found if isinstance(written, str) and isinstance(found, str) else written


def check_reference(where: str, settings: PreferenceSettings, agents: Iterable[AgentSettings]) -> None:
    """Raises ValueError where the reference is a policy without its adapter, and the policy has none."""
    full = [agent.name for agent in agents if not isinstance(agent.tuning, LoraSettings)]
    if settings.reference == "adapter-off" and full:
        what = f"adapter-off needs `tuning: {{type: lora}}`, which {full[0]} does not have"
        raise ValueError(f"{where}reference: {what} Fix: change one of the two")
