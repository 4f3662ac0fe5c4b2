"""What can be known to be wrong with scorers and reward models before any work, from configs and headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from macpo.agent_settings import AgentSettings
from macpo.config import Recipe
from macpo.engine.data.chat import load_tokenizer
from macpo.engine.errors import ResourceError
from macpo.engine.model_folders import is_adapter, local_folder, num_parameters, refuse_adapter, weight_files
from macpo.engine.models.compute import memory_budget
from macpo.engine.models.loading import read_config
from macpo.engine.models.reward.classifier import check_classifier
from macpo.engine.models.reward.saving import check_class, padding_id
from macpo.method.policies import chat_with
from macpo.method.run_plan import Builder, Plan
from macpo.method.scoring.planned import own_model
from macpo.method.scoring.scorers import scorer_chat
from macpo.recipe_kinds import AnyRecipe
from macpo.scorer_settings import ScorerSettings


def scorer_checks(recipe: AnyRecipe) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check of the recipe's scorers and of what becomes a reward model, with the setting that it is about."""
    if recipe.recipe == "reward":
        yield "", partial(_trainable, recipe, recipe.agents[0])
    if not isinstance(recipe, Recipe):
        return
    for index, scorer in enumerate(recipe.evaluation.scorers):
        where = f"evaluation.scorers.{index}"
        if scorer.training is not None:
            yield f"{where}.reward.train", partial(_trainable, recipe, own_model(scorer) or recipe.student)
        elif scorer.kind == "reward":
            yield f"{where}.reward", partial(_classifier, recipe, scorer)
        elif scorer.kind == "implicit-reward":
            yield f"{where}.base", partial(_base, scorer)
            yield f"{where}.policy", partial(_policy, scorer)


def _classifier(recipe: Recipe, scorer: ScorerSettings) -> None:
    """It has a head, the label, a template, and fits into memory."""
    path, trust = str(scorer.reward), scorer.trust_remote_code
    folder = local_folder(path, kind="reward model", trust_remote_code=trust)
    check_classifier(folder, label=scorer.label, trust_remote_code=trust)
    scorer_chat(path, scorer.template, trust_remote_code=trust)
    size = 4 if "float32" in (scorer.dtype, recipe.compute.dtype if scorer.dtype == "auto" else "") else 2
    needed, budget = num_parameters(weight_files(folder)) * size, memory_budget(recipe.compute)
    if needed > budget:
        raise ResourceError(
            f"it needs {needed / 1e9:.2f} GB, the budget is {budget / 1e9:.2f} GB",
            "raise compute.memory_gb, or use a smaller reward model or dtype",
        )


def _trainable(recipe: AnyRecipe, agent: AgentSettings) -> None:
    """Its architecture has a sequence classifier, and its tokenizer a token for padding; a made one's always do."""
    if agent.init is not None or agent.model is None:
        return
    trust = recipe.trust_remote_code
    folder = local_folder(agent.model, trust_remote_code=trust)
    refuse_adapter(folder)
    check_class(read_config(folder), agent.model)
    padding_id(chat_with(Builder(recipe, Plan()).stage_agent(agent), load_tokenizer(folder, trust_remote_code=trust)))


def _base(scorer: ScorerSettings) -> None:
    folder = local_folder(str(scorer.base))
    refuse_adapter(folder)
    weight_files(folder)


def _policy(scorer: ScorerSettings) -> None:
    folder = local_folder(str(scorer.policy), kind="policy")
    weight_files(folder, "adapter_model" if is_adapter(folder) else "model")
