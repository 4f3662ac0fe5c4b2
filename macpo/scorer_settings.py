"""What scores generated responses: `evaluation.scorers` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from macpo.engine.config import ComputeSettings, LoraSettings, Name, PositiveInt, RewardSettings, Settings, Tuning
from macpo.engine.data.templates import Template
from macpo.engine.paths import HubPath, OptionalHubPath


class RewardTraining(Settings):
    """A reward model trained in this run, on the human pairs of `data.reward_prompts`, which no agent sees."""

    model: OptionalHubPath | None = None
    """What it starts from: a folder or Hub id; default the student's base model, with its tokenizer and template."""
    tuning: Tuning = LoraSettings()
    """Low-rank adapters, merged when it is saved, or all weights."""
    training: RewardSettings = RewardSettings()
    """The loss and how it is minimised."""


class TrainedReward(Settings):
    """`reward: {train: {…}}`."""

    train: RewardTraining


class ScorerSettings(Settings):
    """One scorer of responses: a reward model, a policy's implicit reward, or the demo world's rules."""

    name: Name
    """How it is called in folders and reports."""
    kind: Literal["reward", "implicit-reward", "gold"] = "reward"
    """`reward`: a sequence classifier; `implicit-reward`: beta (log p under `policy` - log p under `base`), as DPO,
    arXiv 2305.18290, equation 5, defines it; `gold`: the exact rules of `data.world`."""
    reward: HubPath | TrainedReward | None = None
    """A folder or Hub id of any AutoModelForSequenceClassification with safetensors weights; or {train: {…}}."""
    policy: OptionalHubPath | None = None
    """For implicit-reward: a policy, which may be an adapter of `base`."""
    base: OptionalHubPath | None = None
    """For implicit-reward: the model before its preference training, whose tokenizer reads the responses."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """For implicit-reward: the scale, such as the beta that the policy was trained with; default 0.1."""
    label: str | None = None
    """Which output of a classifier with several is the score, by the name in its config."""
    template: Template = "auto"
    """Chat template: `auto` is its own tokenizer's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of its weights; `auto` is the recipe's compute.dtype. A linear `score` head computes in float32."""
    batch_tokens: PositiveInt = 16384
    """Tokens of a batch with its padding; changes memory and speed."""
    max_tokens: PositiveInt | None = None
    """Longest dialogue, whose oldest turns go first; default what its positions
    allow, for one trained in this run context_tokens."""
    trust_remote_code: bool = False
    """Run code that its folder brings along."""

    @property
    def training(self) -> RewardTraining | None:
        """How it is trained in this run; None where it is ready."""
        return self.reward.train if isinstance(self.reward, TrainedReward) else None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> ScorerSettings:
        needed = {"reward": ("reward",), "implicit-reward": ("policy", "base"), "gold": ()}
        reads = {
            "reward": {"reward", "label", "template", "dtype", "batch_tokens", "max_tokens", "trust_remote_code"},
            "implicit-reward": {"policy", "base", "beta", "template"},
            "gold": set(),
        }
        for name in needed[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: a scorer of kind {self.kind} needs it Fix: add {name}")
        for name, field in type(self).model_fields.items():
            is_set = name not in ("name", "kind") and getattr(self, name) != field.default
            if is_set and name not in reads[self.kind]:
                raise ValueError(f"{name} is not read by a scorer of kind {self.kind} Fix: leave {name} out")
        if self.training is not None and (self.label is not None or self.template != "auto" or self.trust_remote_code):
            raise ValueError("label, template and trust_remote_code are for ready models Fix: leave them out")
        return self


def check_reward(tuning: Tuning, compute: ComputeSettings) -> None:
    """Raise ValueError for settings that a reward model cannot be trained with."""
    if isinstance(tuning, LoraSettings) and tuning.quantization != "none":
        what = "a reward model is saved merged, which is not exact for an adapter of a 4-bit base"
        raise ValueError(f"tuning.quantization: {what} Fix: set quantization to none")
    if compute.parallel.tensor > 1:
        what = "tensor parallelism splits a head by vocabulary, and a reward model's has one row"
        raise ValueError(f"compute.parallel.tensor: {what} Fix: set tensor to 1 and sharding to shard")
