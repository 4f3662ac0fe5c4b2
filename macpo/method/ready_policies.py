"""Models and already trained policies that a recipe names, checked before any work: whole model or adapter, and whose.

Everything is judged from configs and the headers of weight files; models are built without memory for weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from macpo.config import AgentSettings
from macpo.engine.config import LoraSettings, Tuning
from macpo.engine.errors import ConfigError, Problem
from macpo.engine.models import lora
from macpo.engine.models.adapter_rules import read_config
from macpo.engine.models.flops import meta_model
from macpo.engine.models.from_scratch import llama_shape
from macpo.engine.models.loading import is_adapter, local_folder, refuse_adapter


@dataclass(frozen=True, slots=True)
class Named:
    """The models that a recipe names for one agent, and by which fields."""

    agent: AgentSettings
    model: str = "model"
    positive: str = "positive"
    negative: str = "negative"
    tuning: str = "tuning"
    reference: str = "reference_model"
    reference_model: str | None = None
    """A reference of the agent's preference training."""

    @classmethod
    def under(cls, where: str, agent: AgentSettings, training: str, reference_model: str | None) -> Named:
        """Those of an agent that the recipe has at `where`, trained as it says at `training`."""
        fields = {name: f"{where}.{name}" for name in ("model", "positive", "negative", "tuning")}
        return cls(agent, **fields, reference=f"{training}.reference_model", reference_model=reference_model)


def check_policies(agents: Sequence[Named], *, trust_remote_code: bool = False) -> None:
    """Check the models, adapters and LoRA targets of a recipe's agents.

    A model that is not here, or that transformers cannot build, is left to the checks of models.

    Raises:
        ConfigError: an adapter where a whole model is needed, one that is not used exactly or does not fit its base, or
            LoRA targets that the model does not have; all of them at once, each with its field.
    """
    problems: list[Problem] = []
    for named in agents:
        for field, check in _checks(named, trust_remote_code):
            try:
                check()
            except ConfigError as error:
                problems += [replace(problem, field=field) for problem in error.problems]
    if problems:
        raise ConfigError(problems=list(dict.fromkeys(problems)))


def _checks(named: Named, trust: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(field, check that raises ConfigError)."""
    agent = named.agent
    paths = {
        named.model: agent.model,
        named.positive: agent.positive,
        named.negative: agent.negative,
        named.reference: named.reference_model,
    }
    folders = {field: found for field, path in paths.items() if path and (found := _folder(path, trust)) is not None}
    own = named.positive if agent.model is None and agent.init is None else named.model
    if own in folders:
        yield own, functools.partial(refuse_adapter, folders[own])
    base = functools.partial(_base, agent, folders.get(own), trust)
    learns = agent.train or (agent.negative is None and agent.served is None)
    for field, folder in folders.items():
        if field != own and is_adapter(folder):
            tuning = agent.tuning if learns and field == named.positive else None
            yield field, functools.partial(_adapter, base, folder, tuning)
    if learns and isinstance(agent.tuning, LoraSettings):
        yield f"{named.tuning}.target_modules", functools.partial(_targets, base, agent.tuning)


def _folder(path: str, trust: bool) -> Path | None:
    try:
        return local_folder(path, trust_remote_code=trust)
    except ConfigError:
        return None


def _base(agent: AgentSettings, folder: Path | None, trust: bool) -> PreTrainedModel | None:
    """The agent's base model without memory for its weights; None where that cannot be built from a config."""
    try:
        if agent.init is not None:
            return meta_model(llama_shape(agent.init))
        if folder is None or is_adapter(folder):
            return None
        return meta_model(AutoConfig.from_pretrained(str(folder), trust_remote_code=trust))
    except (ConfigError, ValueError, OSError, KeyError):
        return None


def _adapter(base: Callable[[], PreTrainedModel | None], folder: Path, tuning: Tuning | None) -> None:
    model = base()
    if model is None:
        read_config(folder)
    else:
        lora.check_adapter(model, folder, tuning)


def _targets(base: Callable[[], PreTrainedModel | None], tuning: LoraSettings) -> None:
    model = base()
    if model is not None:
        with torch.device("meta"):
            lora.new_adapter(model, tuning, seed=0)
