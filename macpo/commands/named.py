"""What a recipe names: data sets, whole models and adapters, each with the setting that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from macpo.agent_settings import AgentSettings
from macpo.config import Recipe
from macpo.data.rows import Source
from macpo.engine import model_folders
from macpo.engine.config import LoraSettings, PreferenceSettings
from macpo.engine.errors import ConfigError
from macpo.method.data_sets import held_out_source, own_source, source_of
from macpo.method.scoring.planned import own_model
from macpo.recipe_kinds import AnyRecipe


@dataclass(frozen=True, slots=True)
class Model:
    """One model that the recipe names, and what it is for."""

    field: str
    """Where the recipe names it."""
    path: str
    agent: AgentSettings
    has_agents_tokens: bool = True
    """Whether the agent's tokenizer lies in its folder."""

    @property
    def is_loaded(self) -> bool:
        """Whether a run reads its weights; the model of some served agents gives the tokenizer alone."""
        return self.agent.has_weights or not self.has_agents_tokens


def agents_of(recipe: AnyRecipe) -> Iterator[tuple[str, AgentSettings]]:
    """The agents that take part, each with the beginning of its settings' names."""
    if not isinstance(recipe, Recipe):
        yield "", recipe.agents[0]
        return
    for index, teacher in enumerate(recipe.teachers):
        if teacher in recipe.active_teachers:
            yield f"teachers.{index}.", teacher
    yield "student.", recipe.student


def policies_of(recipe: AnyRecipe) -> Iterator[tuple[str, str, AgentSettings]]:
    """Setting, path and agent of every already trained policy that is named."""
    for where, agent in agents_of(recipe):
        positive = f"{where}positive" if where else "adapter"
        for name, path in ((positive, agent.positive), (f"{where}negative", agent.negative)):
            if path:
                yield name, path, agent


def sources_of(recipe: AnyRecipe) -> Iterator[tuple[str, Callable[[], Source | None]]]:
    """Every data set that is named: the setting that names it, and a function that returns it.

    The function raises ConfigError for a setting that goes with no data, and returns None where none is to be read.
    """
    data = recipe.data
    if data.path is None:
        return
    yield "data.path", partial(source_of, data)
    yield "data.test_path" if data.test_path is not None else "data.test_split", partial(held_out_source, data)
    if isinstance(recipe, Recipe):
        for index, teacher in enumerate(recipe.teachers):
            if teacher.data is not None:
                yield f"teachers.{index}.data", partial(own_source, data, teacher.data)


def models_of(recipe: AnyRecipe) -> Iterator[Model]:
    """Every whole model that is named; `adapters_of` has the adapters."""
    for where, agent in agents_of(recipe):
        if agent.model:
            yield Model(f"{where}model", agent.model, agent)
    for name, path, agent in policies_of(recipe):
        if not is_adapter(path):
            yield Model(name, path, agent, has_agents_tokens=not agent.model and path == agent.positive)
    for index, scorer in enumerate(recipe.evaluation.scorers if isinstance(recipe, Recipe) else ()):
        if (own := own_model(scorer)) is not None:
            yield Model(f"evaluation.scorers.{index}.reward.train.model", str(own.model), own)
    for field_, settings, agent in _preferences(recipe):
        if settings.reference_model is not None and not is_adapter(settings.reference_model):
            yield Model(field_, settings.reference_model, agent, has_agents_tokens=False)


def _preferences(recipe: AnyRecipe) -> Iterator[tuple[str, PreferenceSettings, AgentSettings]]:
    if isinstance(recipe, Recipe):
        for teacher in recipe.active_teachers:
            yield "teacher_training.preference.reference_model", recipe.teacher_training.preference, teacher
        yield "student_training.preference.reference_model", recipe.student_training.preference, recipe.student
    elif recipe.recipe == "preference":
        yield "training.reference_model", recipe.training, recipe.agents[0]


def adapters_of(recipe: AnyRecipe) -> Iterator[tuple[str, str, AgentSettings]]:
    """Setting, path and agent of every adapter that is named as a policy or a reference."""
    references = ((field_, settings.reference_model or "", agent) for field_, settings, agent in _preferences(recipe))
    for name, path, agent in (*policies_of(recipe), *references):
        if path and is_adapter(path):
            yield name, path, agent


def is_adapter(path: str) -> bool:
    """Whether a folder or Hub id is an adapter; what cannot be had is left to the checks of models."""
    return model_folders.is_adapter(Path(path)) if Path(path).is_absolute() else _is_hub_adapter(path)


@cache
def _is_hub_adapter(name: str) -> bool:
    try:
        return model_folders.is_adapter(model_folders.local_folder(name))
    except ConfigError:
        return False


def four_bits(agent: AgentSettings) -> bool:
    return isinstance(agent.tuning, LoraSettings) and agent.tuning.quantization == "nf4"
