"""`macpo export`: one policy of a run as a Hugging Face or peft folder, read back and compared before it counts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from macpo.agent_settings import AgentSettings
from macpo.commands.model_card import Exported, model_card
from macpo.engine.config import FullSettings
from macpo.engine.data.chat import Chat
from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import PolicyRef, local_folder
from macpo.engine.models.compute import device_of, memory_budget, model_cache
from macpo.engine.models.loading import as_dtype, stored_dtype
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.saving import cast, logits_of, publish, publish_copy, refuse_existing
from macpo.engine.paths import absolute_or_hub
from macpo.engine.run.folder import folder_of
from macpo.engine.run.keys import is_unknown
from macpo.method.identities import Identities
from macpo.method.policies import StageAgent, chat_of, policy_ref
from macpo.method.run_plan import Builder, Plan
from macpo.recipe_kinds import AnyRecipe, plan_of
from macpo.standalone.config import RewardRecipe


@dataclass(frozen=True, slots=True)
class Choice:
    """Which policy of a run is exported, and how."""

    agent: str = ""
    """Empty: the student, or the one that a standalone recipe trains."""
    iteration: int = -1
    """-1 is the last."""
    policy: str = "positive"
    arm: str = ""
    merge: bool = False
    dtype: str | None = None
    """Of the weights that are written; None: of a whole model its base's, as stored; of an adapter its own."""


def export(run_dir: Path, recipe: AnyRecipe, out: Path, choice: Choice) -> tuple[Path, str | None]:
    """Write a policy to `out`, which is there only once it was loaded again and gave the same logits.

    Neither data nor models of other agents are read. An adapter whose base model is not here is copied as the run saved
    it, and compared with that file by file.

    Returns:
        (`out`, the base that an exported adapter names: an absolute path or a Hub id; None of a whole model).

    Raises:
        ConfigError (2): no such agent, iteration or policy, `out` exists, or the base to merge into is not here.
        IntegrityError (5): what was read back differs.
    """
    run_dir, out = Path(os.path.abspath(run_dir)), Path(os.path.abspath(out.expanduser()))
    refuse_existing(out)
    agent = named_agent(recipe, choice.agent)
    settings = agent_settings(recipe, agent)
    if settings.served is not None:
        raise ConfigError(f"{agent} is served: its weights are not here", "export another agent", field="--agent")
    chosen = choose(run_dir, plan_of(recipe, must_exist=False), settings, replace(choice, agent=agent))
    if isinstance(recipe, RewardRecipe):
        return _export_reward(recipe, run_dir, out, chosen, choice), None
    ref, is_adapter = chosen.ref, chosen.ref.adapter is not None and not choice.merge
    loads_on = absolute_or_hub(ref.base) if is_adapter else None
    base_name = settings.model or f"base-{settings.name}"
    reading = reading_of(recipe, settings)
    if choice.merge and ref.adapter is None:
        print("the policy is a whole model: there is nothing to merge")
    if ref.adapter is not None and _is_missing(ref.base):
        _without_base(ref, choice)
        chat = _saved_chat(reading, ref)
        card = model_card(recipe, run_dir, chosen, base_name=base_name, is_adapter=is_adapter, chat=chat)
        publish_copy(local_folder(ref.adapter, kind="adapter"), out, card=card)
        return out, loads_on
    chat = chat_of_policy(recipe, chosen, reading)
    card = model_card(recipe, run_dir, chosen, base_name=base_name, is_adapter=is_adapter, chat=chat)
    models = _models(recipe, ref, merge=choice.merge)
    original = models.policy(ref)
    expected = logits_of(original, len(chat.tokenizer))
    policy = models.policy(ref, FullSettings()) if choice.merge else original
    if choice.dtype is not None or not is_adapter:
        cast(policy, as_dtype(choice.dtype) if choice.dtype is not None else _base_dtype(chosen, recipe))
    publish(
        policy,
        out,
        base=ref.base,
        base_name=loads_on or base_name,
        chat=chat,
        card=card,
        expected=expected,
    )
    return out, loads_on


def _export_reward(recipe: RewardRecipe, run_dir: Path, out: Path, chosen: Exported, choice: Choice) -> Path:
    """Copy a reward model, which was saved merged and as plain transformers loads it."""
    for name, value in (("--merge", choice.merge), ("--dtype", choice.dtype)):
        if value:
            problem = "a reward model is exported as it was saved: merged, in float32"
            raise ConfigError(problem, f"leave out {name}", field=name)
    reading = reading_of(recipe, chosen.settings)
    base_name = chosen.settings.model or f"base-{chosen.settings.name}"
    chat = _saved_chat(reading, chosen.ref)
    card = model_card(recipe, run_dir, chosen, base_name=base_name, is_adapter=False, chat=chat)
    publish_copy(Path(chosen.ref.base), out, card=card, stem="model")
    return out


def reading_of(recipe: AnyRecipe, settings: AgentSettings) -> StageAgent:
    """What turns text into an agent's tokens; models and templates need not be here."""
    return Builder(recipe, Plan(identities=Identities(must_exist=False))).stage_agent(settings)


def chat_of_policy(recipe: AnyRecipe, chosen: Exported, reading: StageAgent) -> Chat:
    """The tokenizer and template of a policy. Raises ConfigError where they are not here."""
    of_base = chosen.trained_by is None and not _is_missing(chosen.base)  # a policy of others' may have no tokenizer
    at = chosen.base if of_base else chosen.ref.base
    chat = _saved_chat(reading, chosen.ref) if is_unknown(reading.template) else chat_of(reading, at)
    if chat is None:
        name = chosen.settings.template or recipe.template
        raise ConfigError(f"the template {name} is not here", "put it back", field="template")
    return chat


def _is_missing(path: str) -> bool:
    return Path(path).is_absolute() and not Path(path).is_dir()


def _without_base(ref: PolicyRef, choice: Choice) -> None:
    """Raise ConfigError for what an adapter without its base cannot become; else say that it is only copied."""
    if choice.merge:
        fix = "put the model back, or export the adapter without --merge"
        raise ConfigError(f"the model {ref.base} is not here", fix, field="--merge")
    if choice.dtype is not None:
        problem = f"the base model {ref.base} is not here, and what is written in another dtype is compared on it"
        raise ConfigError(problem, "put the model back, or export without --dtype", field="--dtype")
    print(f"the base model {ref.base} is not here: the adapter is copied, its logits are not compared")


def _models(recipe: AnyRecipe, ref: PolicyRef, *, merge: bool) -> ModelCache:
    """Models in the dtype that loses nothing: float32 to merge in, else that of a whole policy's own files."""
    compute, trust = recipe.compute, recipe.trust_remote_code
    if ref.adapter is not None and not merge:
        return model_cache(compute, trust)
    dtype = torch.float32 if merge else stored_dtype(local_folder(ref.base, trust_remote_code=trust))
    return ModelCache(
        memory_budget(compute), dtype, device_of(compute), parallel=compute.parallel, trust_remote_code=trust
    )


def _base_dtype(chosen: Exported, recipe: AnyRecipe) -> torch.dtype:
    """The dtype of the base model's files; where these are no longer here, of the policy's own."""
    try:
        folder = local_folder(chosen.base, trust_remote_code=recipe.trust_remote_code)
    except ConfigError:
        folder = local_folder(chosen.ref.base, trust_remote_code=recipe.trust_remote_code)
    return stored_dtype(folder)


def _saved_chat(reading: StageAgent, ref: PolicyRef) -> Chat | None:
    """Tokenizer and template as they lie beside a trained policy; None where they do not."""
    folder = Path(ref.adapter or ref.base)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return chat_of(reading.model_copy(update={"template": "auto"}), str(folder))


def named_agent(recipe: AnyRecipe, agent: str) -> str:
    """The agent's name; empty, it is the last agent's, and `student` is the student whatever its name."""
    names = [each.name for each in recipe.agents]
    is_student = recipe.recipe == "macpo" and agent == "student" and agent not in names
    return names[-1] if is_student or not agent else agent


def agent_settings(recipe: AnyRecipe, agent: str) -> AgentSettings:
    found = {a.name: a for a in recipe.agents}
    if recipe.recipe == "macpo":
        found["ceiling"] = recipe.student
    if agent not in found:
        raise ConfigError(f"no agent {agent!r} in this run", f"one of {', '.join(sorted(found))}", field="--agent")
    return found[agent]


def choose(run_dir: Path, plan: Plan, settings: AgentSettings, choice: Choice) -> Exported:
    """Where the weights of an agent's policy lie in the run's folder, and what is known of them."""
    agent, iteration, policy, arm = choice.agent, choice.iteration, choice.policy, choice.arm
    at: int | None = None
    evaluated_by = None
    arms = sorted({point.arm for point in plan.points} - {""})
    if arm and arm not in arms:
        fix = f"use one of {', '.join(arms)}" if arms else "leave --arm out"
        raise ConfigError(f"there is no arm {arm!r} in this run", fix, field="--arm")
    if policy == "negative":
        key = (arm, agent)
        if key not in plan.negatives:
            raise ConfigError(f"{agent} has no negative policy in this run", "export another", field="--policy")
        stage, ready = plan.negatives[key], settings.negative
    else:
        found = {p.iteration: p for p in plan.points if (p.arm, p.agent) == (arm, agent)}
        if iteration == -1 and found:
            iteration = max(found)
        if iteration not in found:
            raise ConfigError(
                f"{agent} has no iteration {iteration}",
                f"use one of {', '.join(map(str, sorted(found)))}, or -1 (last)" if found else "name another agent",
                field="--iteration",
            )
        point = found[iteration]
        stage, ready, at, evaluated_by = point.policy, settings.positive, iteration, point.evaluation
    base = settings.model or settings.positive or str(folder_of(run_dir, f"base-{settings.name}") / "model")
    path = str(folder_of(run_dir, stage) / "policy") if stage is not None else str(ready or base)
    if _is_missing(path):
        raise ConfigError(f"the model {path} is not here", "put the model back", field="--agent")
    return Exported(policy_ref(base, path), settings, agent, policy, at, stage, evaluated_by, base)
