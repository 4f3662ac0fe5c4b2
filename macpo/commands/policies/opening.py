"""Where a policy comes from: an agent of a run's folder, a model or adapter folder, or the Hub."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from macpo.commands.export import Choice, agent_settings, chat_of_policy, choose, named_agent, reading_of
from macpo.commands.policies.policy import Policy
from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.config import ComputeSettings, SamplingSettings
from macpo.engine.data.chat import load_tokenizer
from macpo.engine.errors import ConfigError
from macpo.engine.foreign import read_json_object
from macpo.engine.generation.vocabulary import check_vocab
from macpo.engine.model_folders import PolicyRef, is_adapter, local_folder
from macpo.engine.models.compute import generation_batch, model_cache
from macpo.engine.paths import expanded
from macpo.recipe_kinds import AnyRecipe, load, plan_of
from macpo.standalone.config import PolicyRecipe, RewardRecipe


def load_policy(
    source: str | os.PathLike[str],
    agent: str = "",
    iteration: int | None = None,
    *,
    arm: str = "",
    policy: str = "positive",
    device: str | None = None,
    dtype: str | None = None,
) -> Policy:
    """A policy with its tokenizer, template and sampling, ready to `generate` and to `score`.

    Args:
        source: the folder of a run, finished or not; or the folder or Hub id of a model, or of an adapter in peft's
            layout, whose base is then loaded too.
        agent: of a run: the student (default), a teacher's name, or `ceiling`.
        iteration: of a run: 0 is before the first iteration; default the last.
        arm: of a run: an ablation's name instead of the main run.
        policy: of a run: "positive", or the agent's "negative" one, which was trained to behave badly.
        device: "auto", "cpu" or "cuda"; default the run's own, else "auto".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32" or "bfloat16"; default the run's own.

    Raises:
        ConfigError: no such folder, agent, iteration or policy; a served agent, or a run of a reward model.
        IntegrityError: a damaged weight file.
    """
    source = os.fspath(source)
    here = expanded(source)
    compute = [(name, value) for name, value in (("device", device), ("dtype", dtype)) if value is not None]
    if not (here / "recipe.yaml").is_file():
        if agent or iteration is not None or arm or policy != "positive":
            fix = "name the folder of a run, or leave agent, iteration, arm and policy out"
            raise ConfigError(f"{source!r} is not the folder of a run, so it has no agents", fix)
        settings = recipes.loads(dict(compute), ComputeSettings, file=source)
        return _of_files(source, settings)
    recipe = load(here, [f"compute.{name}={value}" for name, value in compute])
    choice = Choice(agent, -1 if iteration is None else iteration, policy, arm)
    try:
        return policy_of_run(here, recipe, choice)
    except ConfigError as error:  # what is an option of the command line is an argument here
        problems = [replace(each, field=each.field.removeprefix("--")) for each in error.problems]
        raise ConfigError(problems=problems) from None


def policy_of_run(run_dir: Path, recipe: AnyRecipe, choice: Choice, *, seed: int | None = None) -> Policy:
    """One policy of a run, to write and score as the run's stages do. `seed` of the sampling; default the recipe's.

    Raises ConfigError as `load_policy` does.
    """
    if isinstance(recipe, RewardRecipe):
        raise ConfigError("a reward model gives scores and writes no responses", "name another run", file=run_dir)
    agent = named_agent(recipe, choice.agent)
    settings = agent_settings(recipe, agent)
    if settings.served is not None:
        fix = "ask its server, or name another agent"
        raise ConfigError(f"{agent} is served: its weights are not here", fix, field="--agent")
    chosen = choose(run_dir.absolute(), plan_of(recipe, must_exist=False), settings, replace(choice, agent=agent))
    reading = reading_of(recipe, settings)
    chat = chat_of_policy(recipe, chosen, reading)
    module = model_cache(recipe.compute, recipe.trust_remote_code).policy(chosen.ref)
    check_vocab(module.base, chat.tokenizer)
    name = f"{agent} (negative)" if chosen.iteration is None else f"{agent}@{chosen.iteration}"
    return Policy(
        f"{choice.arm}.{name}" if choice.arm else name,
        module,
        chat,
        reading.model_copy(update={"long_prompt": "truncate"}),
        (recipe.sampling if isinstance(recipe, Recipe | PolicyRecipe) else None) or SamplingSettings(),
        recipe.seed if seed is None else seed,
        generation_batch(recipe.compute, module.base.config, reading.context_tokens),
    )


def _of_files(source: str, compute: ComputeSettings) -> Policy:
    """The policy in a folder or on the Hub, whose tokenizer lies beside it, or beside an adapter's base."""
    folder = local_folder(source, kind="run, model or adapter")
    ref, reads = PolicyRef(source), folder
    if is_adapter(folder):
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            fix = "write base_model_name_or_path into adapter_config.json"
            raise ConfigError("the adapter does not say of which model it is", fix, file=folder)
        ref = PolicyRef(base, source)
        reads = folder if (folder / "tokenizer_config.json").is_file() else local_folder(base)
    module = model_cache(compute, False).policy(ref)
    found = Policy.of(module, load_tokenizer(reads), source)
    found.max_batch = generation_batch(compute, module.base.config, found.reading.context_tokens)
    return found
