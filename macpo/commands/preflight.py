"""What can be known to be wrong before any work: one list of checks for `macpo check`, `plan` and `run`.

    preflight(recipe, plan)                     # for this machine
    preflight(recipe, plan, gpu=GPUS["H200"])   # for another one

A check is a function that raises MacpoError; one that holds for a recipe goes into OF_RECIPE, one for a model into
OF_MODEL. Each reads small files and headers of weights alone. All problems are reported together.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from macpo.agent_settings import AgentSettings
from macpo.commands.adapters import check_adapter, check_targets
from macpo.commands.named import Model, adapters_of, agents_of, four_bits, models_of, sources_of
from macpo.commands.planning.estimates import disk_needed
from macpo.commands.preflight_scorers import scorer_checks
from macpo.config import Recipe
from macpo.data.folders import data_files
from macpo.data.rows import Source, is_local
from macpo.engine.data.chat import load_tokenizer
from macpo.engine.errors import ConfigError, MacpoError, Problem, ResourceError
from macpo.engine.files import require_free
from macpo.engine.generation.vocabulary import check_vocab
from macpo.engine.hardware import Gpu
from macpo.engine.model_folders import local_folder, refuse_adapter
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.compute import RESIDENT_SHARE, device_of, dtype_of, memory_budget
from macpo.engine.models.equivalence import expected_window
from macpo.engine.models.flops import meta_model
from macpo.engine.models.from_scratch import llama_shape
from macpo.engine.models.head import head_of
from macpo.engine.models.loading import read_config
from macpo.engine.models.support import ROUTER_OFF, router_loss_coefficient
from macpo.engine.planning.headers import Folder, inspect
from macpo.engine.planning.memory import tensor_config
from macpo.method.identities import template_text
from macpo.method.policies import chat_with
from macpo.method.run_plan import Builder, Plan
from macpo.recipe_kinds import AnyRecipe


@dataclass
class Place:
    """Where the recipe shall run, and the model folders that were looked at."""

    recipe: AnyRecipe
    plan: Plan
    ranks: int | None = None
    """Processes that share a stage; None is not known yet."""
    gpu: Gpu | None = None
    """Each process's GPU; None is this machine."""
    _folders: dict[str, Folder | MacpoError] = field(default_factory=dict)

    def folder(self, path: str) -> Folder:
        """The model at a path, looked at once. Raises MacpoError as `inspect` does."""
        if path not in self._folders:
            try:
                self._folders[path] = inspect(path, trust_remote_code=self.recipe.trust_remote_code)
            except MacpoError as error:
                self._folders[path] = error
        found = self._folders[path]
        if isinstance(found, MacpoError):
            raise found
        return found


def preflight(recipe: AnyRecipe, plan: Plan, *, ranks: int | None = None, gpu: Gpu | None = None) -> None:
    """Raise what a run of the recipe, or of one of its arms, would stumble over, all of it at once.

    Args:
        plan: the recipe's; what it names need not exist.
        ranks: processes that will share a stage, where that is known.
        gpu: judge `compute` by this GPU instead of by this machine.

    Raises:
        MacpoError: its code is that of the problems' kind; of several kinds, 2 where a setting is among them, else the
            first one's.
    """
    place = Place(recipe, plan, ranks, gpu)
    arms = [recipe.arm(name) for name in recipe.ablations] if isinstance(recipe, Recipe) else []
    errors: list[MacpoError] = []
    problems: dict[tuple[str, str], Problem] = {}
    for each in (recipe, *arms):
        for where, check in _all(replace(place, recipe=each)):
            try:
                check()
            except MacpoError as error:
                errors.append(error)
                for problem in error.problems:
                    named = replace(problem, field=_field(where, problem.field))
                    problems.setdefault((problem.message, problem.file or named.field), named)
    if not errors and (needed := disk_needed(recipe, plan)) is not None:
        require_free(Path(recipe.output), needed, "the run (estimated)")
    if errors:
        kind = next((type(error) for error in errors if isinstance(error, ConfigError)), type(errors[0]))
        raise kind(problems=list(problems.values()))


def _field(where: str, own: str) -> str:
    """The setting to name: the model's or data set's, and the check's own where it has one."""
    return f"{where}: {own}" if where and own and not own.startswith(where) else own or where


def _all(place: Place) -> Iterator[tuple[str, Callable[[], None]]]:
    for check in OF_RECIPE:
        yield "", lambda check=check: check(place)  # type: ignore[misc]
    yield from scorer_checks(place.recipe)
    for field_, source in sources_of(place.recipe):
        yield field_, lambda source=source: _data(source())  # type: ignore[misc]
    for model in models_of(place.recipe):
        for each in OF_MODEL:
            yield model.field, lambda each=each, model=model: each(model, place)  # type: ignore[misc]
    for name, path, agent in adapters_of(place.recipe):
        yield name, lambda path=path, agent=agent: _adapter(path, agent, place)  # type: ignore[misc]
    for where, agent in agents_of(place.recipe):
        yield "", lambda where=where, agent=agent: _targets(where, agent, place)  # type: ignore[misc]


# --- the recipe -----------------------------------------------------------------------------------------------------


def _output(place: Place) -> None:
    """The run's folder, and that of cached log-probs, can be written; nothing is left behind."""
    for name, path in (("output", place.recipe.output), ("compute.cache", place.recipe.compute.cache)):
        if path is None:
            continue
        folder = Path(path)
        there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            if error.filename is None and not there.is_dir():
                error.strerror = "Not a directory"
            problem = f"cannot write into the output folder: {error.strerror}"
            raise ConfigError(problem, "choose a folder that can be written", file=path, field=name) from error


def _device(place: Place) -> None:
    if place.gpu is None:
        device_of(place.recipe.compute)


def _ranks(place: Place) -> None:
    tensor = place.recipe.compute.parallel.tensor
    if place.ranks is not None and place.ranks % tensor:
        raise ConfigError(
            f"{place.ranks} ranks cannot be split into groups of {tensor}",
            "choose a number of ranks that compute.parallel.tensor divides",
            field="compute.parallel.tensor",
        )


def _quantization(place: Place) -> None:
    """The libraries of 4-bit bases are here, unless another machine is planned for."""
    packed = [where for where, agent in agents_of(place.recipe) if four_bits(agent)]
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if packed and missing and place.gpu is None:
        raise ConfigError(
            f"quantization nf4 needs {' and '.join(missing)}, which is not installed",
            "pip install 'macpo[quant]', or set quantization to none",
            field=f"{packed[0]}tuning.quantization",
        )


def _templates(place: Place) -> None:
    """Those of agents whose tokenizer the run makes; `_tokens` sees to the others."""
    for _, agent in agents_of(place.recipe):
        if agent.init is not None:
            template_text(agent.template or place.recipe.template)


def _inits(place: Place) -> None:
    """Models that the run makes have room for the context, and a corpus."""
    for where, agent in agents_of(place.recipe):
        init = agent.init
        if init is None:
            continue
        _positions(init.context, place, f"{where}init.context")
        if init.corpus != "data" and not Path(init.corpus).is_file():
            raise ConfigError(f"no file {init.corpus!r}", "give a .txt or .jsonl file", field=f"{where}init.corpus")


def _servers(place: Place) -> None:
    for where, agent in agents_of(place.recipe):
        key = agent.served.api_key_env if agent.served is not None else None
        if key is not None and not os.environ.get(key, "").strip():
            problem = f"the environment variable {key} is not set"
            raise ConfigError(problem, "export it with the key", field=f"{where}served.api_key_env")
        arguments = place.recipe.template_arguments if agent.template_arguments is None else agent.template_arguments
        if agent.served is not None and agent.served.api == "chat" and arguments:
            problem = f"{', '.join(arguments)}: under api: chat the server uses its own template, without arguments"
            fix = "use api: completions, or give this agent template_arguments: {} and set them in the server"
            raise ConfigError(problem, fix, field=f"{where}template_arguments")


OF_RECIPE: tuple[Callable[[Place], None], ...] = (
    _output,
    _device,
    _ranks,
    _quantization,
    _templates,
    _inits,
    _servers,
)
"""Checks of the recipe as a whole."""


def _data(source: Source | None) -> None:
    """Its files are there; their rows are for the first stage, and for `macpo check`, to read."""
    if source is not None and is_local(source.path):
        data_files(Path(source.path), source.split, source.subset)


# --- models ---------------------------------------------------------------------------------------------------------


def _weights(model: Model, place: Place) -> None:
    """Safetensors that fit the config, of an architecture that is known."""
    if model.is_loaded:
        place.folder(model.path)


def _architecture(model: Model, place: Place) -> None:
    """What can be said without a forward of whether prompts can be shared and the head be computed apart."""
    skeleton = place.folder(model.path).model if model.is_loaded else None
    if skeleton is not None:
        expected_window(skeleton)
        head_of(skeleton)
        with attention_hook(skeleton):
            pass


def _context(model: Model, place: Place) -> None:
    if model.is_loaded:
        _positions(place.folder(model.path).positions, place, model.field)


def _positions(positions: int | None, place: Place, field_: str) -> None:
    context = place.recipe.context_tokens
    if positions is not None and context > positions:
        raise ConfigError(
            f"context_tokens is {context:,}, and the model has {positions:,} positions",
            f"set context_tokens to {positions} or less",
            field=field_,
        )


def _tokens(model: Model, place: Place) -> None:
    """A tokenizer, a template and an end of responses that go with each other and with the embedding."""
    if not model.has_agents_tokens:
        return
    recipe, agent = place.recipe, model.agent
    folder = local_folder(model.path, trust_remote_code=recipe.trust_remote_code)
    refuse_adapter(folder)
    if not recipe.trust_remote_code:
        read_config(folder)  # which tokenizers are loaded by; what is wrong with it is said once
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
    chat_with(Builder(recipe, Plan()).stage_agent(agent), tokenizer)
    skeleton = place.folder(model.path).model if model.is_loaded else None
    if skeleton is not None:
        check_vocab(skeleton, tokenizer)


def _reference_tokens(model: Model, place: Place) -> None:
    """A reference model reads the policy's own tokens; those of a model that the run makes are not known yet."""
    own = model.agent.model or model.agent.positive
    if not model.field.endswith("reference_model") or not own:
        return
    trust = place.recipe.trust_remote_code
    vocabularies = [load_tokenizer(path, trust_remote_code=trust).get_vocab() for path in (own, model.path)]
    if vocabularies[0] != vocabularies[1]:
        problem, fix = f"{model.path!r} has another vocabulary than the policy", "name a model with the same tokenizer"
        raise ConfigError(problem, fix)


def _memory(model: Model, place: Place) -> None:
    """The base fits into what one process may keep loaded, or into all of them together."""
    if not model.is_loaded:
        return
    compute = place.recipe.compute
    if place.gpu is not None:
        share = RESIDENT_SHARE * place.gpu.memory_bytes / compute.jobs
        budget = int(compute.memory_gb * 1e9 if compute.memory_gb is not None else share)
        size = 4 if compute.dtype == "float32" else 2
    elif compute.device == "cuda" and not torch.cuda.is_available():
        return  # `_device` says so
    else:
        budget, size = memory_budget(compute), dtype_of(compute).itemsize
    needed = place.folder(model.path).num_parameters * (0.5 if four_bits(model.agent) else size)
    if needed > budget * (place.ranks or 1):
        raise ResourceError(
            f"base model {model.path!r} needs {needed / 1e9:.2f} GB, the budget is {budget / 1e9:.2f} GB",
            "raise compute.memory_gb or use a smaller model or dtype, or more ranks",
            field="compute.memory_gb",
        )


def _tensor(model: Model, place: Place) -> None:
    """Tensor parallelism divides the model."""
    tensor = place.recipe.compute.parallel.tensor
    if tensor > 1 and model.is_loaded and (skeleton := place.folder(model.path).model) is not None:
        tensor_config(skeleton.config, tensor)


def _router(model: Model, place: Place) -> None:
    """A load-balancing loss needs logits that transformers collects by hooks, through which nothing compiles."""
    if not place.recipe.compute.parallel.compile or not model.is_loaded:
        return
    skeleton = place.folder(model.path).model
    if skeleton is not None and router_loss_coefficient(skeleton.config):
        problem = "the load-balancing loss of a mixture of experts cannot be compiled"
        raise ConfigError(problem, f"turn compute.parallel.compile off, or {ROUTER_OFF}")


OF_MODEL: tuple[Callable[[Model, Place], None], ...] = (
    _weights,
    _architecture,
    _context,
    _tokens,
    _reference_tokens,
    _memory,
    _tensor,
    _router,
)
"""Checks of each model that the recipe names; what the run makes itself is not among them."""


# --- adapters -------------------------------------------------------------------------------------------------------


def _adapter(path: str, agent: AgentSettings, place: Place) -> None:
    check_adapter(path, agent, _base(agent, place), place.plan)


def _targets(where: str, agent: AgentSettings, place: Place) -> None:
    check_targets(where, agent, _base(agent, place), place.plan)


def _base(agent: AgentSettings, place: Place) -> PreTrainedModel | None:
    """An agent's base model without storage; None of what cannot be looked at, which the checks of models say."""
    if agent.init is not None:
        return meta_model(llama_shape(agent.init))
    path = agent.model or agent.positive
    try:
        found = place.folder(path).model if path else None
    except MacpoError:
        return None
    return None if found is None else meta_model(copy.deepcopy(found.config))
