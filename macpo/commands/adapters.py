"""The adapters that a recipe names or trains, judged before any work from configs and headers of weights alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from macpo.agent_settings import AgentSettings
from macpo.engine.config import LoraSettings, Tuning
from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import local_folder, refuse_adapter, weight_files
from macpo.engine.models.tuning import lora
from macpo.engine.models.tuning.adapter_rules import read_config
from macpo.method.learning import LearningStage
from macpo.method.run_plan import Plan


def check_adapter(path: str, agent: AgentSettings, base: PreTrainedModel | None, plan: Plan) -> None:
    """Check an adapter that is named as one of an agent's policies, or as a reference.

    Args:
        base: the agent's base model on the meta device, which is used up; None where it cannot be looked at.

    Raises:
        ConfigError: a whole model is needed; the adapter is not used exactly, or does not fit the base; or training
            cannot go on from it under the agent's settings.
        IntegrityError: damaged weights.
    """
    folder = local_folder(path, kind="adapter")
    if not agent.model and agent.init is None and path == agent.positive:
        refuse_adapter(folder)
    if base is None:
        read_config(folder)
        weight_files(folder, "adapter_model")
        return
    with torch.device("meta"):
        lora.check_adapter(base, folder, _goes_on_with(path, agent, plan))


def check_targets(where: str, agent: AgentSettings, base: PreTrainedModel | None, plan: Plan) -> None:
    """Check that the LoRA that an agent trains anew has a place in its base, which is used up as above.

    Args:
        where: beginning of the names of the agent's settings.

    Raises:
        ConfigError: the model has no such modules, or they cannot be adapted exactly.
    """
    tuning = agent.tuning
    learns = any(work.tuning == tuning for work in _learning(agent, plan))
    if base is None or not learns or not isinstance(tuning, LoraSettings):
        return
    try:
        with torch.device("meta"):
            lora.new_adapter(base, tuning, seed=0)
    except ConfigError as error:
        field = f"{where}tuning.target_modules"
        raise ConfigError(problems=[replace(problem, field=field) for problem in error.problems]) from error


def _goes_on_with(path: str, agent: AgentSettings, plan: Plan) -> Tuning | None:
    """How training goes on from an adapter; None where it is only used."""
    starts = [work for work in _learning(agent, plan) if work.policy.ready == path and work.inputs.policy is None]
    return agent.tuning if any(work.tuning == agent.tuning for work in starts) else None


def _learning(agent: AgentSettings, plan: Plan) -> list[LearningStage]:
    works = (stage.work for stage in plan.graph.stages)
    return [work for work in works if isinstance(work, LearningStage) and work.agent.name == agent.name]
