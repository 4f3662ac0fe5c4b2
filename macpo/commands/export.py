"""`macpo export`: one policy of a run as a Hugging Face or peft folder, read back and compared before it counts."""

from __future__ import annotations

import os
from pathlib import Path

from macpo.commands.model_card import Exported, model_card
from macpo.config import AgentSettings
from macpo.engine.config import FullSettings
from macpo.engine.data.chat import Chat
from macpo.engine.errors import ConfigError
from macpo.engine.models.compute import model_cache
from macpo.engine.models.policy import PolicyRef
from macpo.engine.models.saving import logits_of, publish, publish_copy
from macpo.engine.run.folder import folder_of
from macpo.engine.run.keys import is_unknown
from macpo.method.identities import Identities
from macpo.method.policies import StageAgent, chat_of
from macpo.method.run_plan import Builder, Plan
from macpo.recipe_kinds import AnyRecipe, plan_of


def export(
    run_dir: Path, recipe: AnyRecipe, out: Path, *, agent: str, iteration: int, policy: str, merge: bool, arm: str = ""
) -> Path:
    """Write the policy of an agent (empty: the student) to `out`, which is there only once it was loaded again and gave
    the same logits. Neither data nor models of other agents are read. An adapter whose base model is not here is copied
    as the run saved it, and compared with that file by file.

    Raises:
        ConfigError (2): no such agent, iteration or policy, `out` exists, or the base to merge into is not here.
        IntegrityError (5): what was read back differs.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", "name a new folder", field="--out")
    agent = agent or recipe.agents[-1].name  # the student, or the one that a standalone recipe trains
    settings = agent_settings(recipe, agent)
    if settings.served is not None:
        raise ConfigError(f"{agent} is served: its weights are not here", "export another agent", field="--agent")
    chosen = choose(run_dir, plan_of(recipe, must_exist=False), settings, agent, iteration, policy, arm)
    ref, is_adapter = chosen.ref, chosen.ref.adapter is not None and not merge
    base_name = settings.model or f"base-{settings.name}"
    if settings.init is not None and is_adapter:
        base_name = os.path.relpath(ref.base, out.parent / "x")
    reading = Builder(recipe, Plan(identities=Identities(must_exist=False))).stage_agent(settings)
    if Path(ref.base).is_absolute() and not Path(ref.base).is_dir():
        if ref.adapter is None or not is_adapter:
            fix = "put the model back" + (", or export the adapter without --merge" if merge and ref.adapter else "")
            raise ConfigError(f"the model {ref.base} is not here", fix, field="--merge" if merge else "--agent")
        chat = _saved_chat(reading, ref)
        card = model_card(recipe, run_dir, chosen, base_name=base_name, is_adapter=is_adapter, chat=chat)
        print(f"the base model {ref.base} is not here: the adapter is copied, its logits are not compared")
        publish_copy(Path(ref.adapter), out, card=card)
        return out
    pool = model_cache(recipe.compute, recipe.trust_remote_code)
    chat = _saved_chat(reading, ref) if is_unknown(reading.template) else chat_of(reading, ref.base)
    if chat is None:
        name = settings.template or recipe.template
        raise ConfigError(f"the template {name} is not here", "put it back", field="template")
    original = pool.policy(ref)
    card = model_card(recipe, run_dir, chosen, base_name=base_name, is_adapter=is_adapter, chat=chat)
    publish(
        pool.policy(ref, FullSettings()) if merge else original,
        out,
        base=ref.base,
        base_name=base_name,
        chat=chat,
        card=card,
        expected=logits_of(original, len(chat.tokenizer)),
    )
    return out


def _saved_chat(reading: StageAgent, ref: PolicyRef) -> Chat | None:
    """Tokenizer and template as they lie beside a trained policy; None where they do not."""
    folder = Path(ref.adapter or ref.base)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return chat_of(reading.model_copy(update={"template": "auto"}), str(folder))


def agent_settings(recipe: AnyRecipe, agent: str) -> AgentSettings:
    found = {a.name: a for a in recipe.agents}
    if recipe.recipe == "macpo":
        found["ceiling"] = recipe.student
    if agent not in found:
        raise ConfigError(f"no agent {agent!r} in this run", f"one of {sorted(found)}", field="--agent")
    return found[agent]


def choose(
    run_dir: Path, plan: Plan, settings: AgentSettings, agent: str, iteration: int, policy: str, arm: str
) -> Exported:
    """Where the weights of an agent's policy lie in the run's folder, and what is known of them."""
    at: int | None = None
    evaluated_by = None
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
                f"{agent} has no iteration {iteration}", f"one of {sorted(found)}, or -1 (last)", field="--iteration"
            )
        point = found[iteration]
        stage, ready, at, evaluated_by = point.policy, settings.positive, iteration, point.evaluation
    base = settings.model or settings.positive or str(folder_of(run_dir, f"base-{settings.name}") / "model")
    folder = folder_of(run_dir, stage) / "policy" if stage is not None else Path(str(ready or base))
    adapter = (folder / "adapter_config.json").exists()
    ref = PolicyRef(base, str(folder)) if adapter else PolicyRef(str(folder))
    return Exported(ref, settings, agent, policy, at, stage, evaluated_by)
