"""The model card of an exported policy: README.md with the Hub's metadata, made only from what the run's files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from macpo import __version__
from macpo.agent_settings import AgentSettings
from macpo.engine.config import PreferenceSettings
from macpo.engine.data.chat import Chat
from macpo.engine.errors import printable
from macpo.engine.files import read_json
from macpo.engine.model_folders import PolicyRef
from macpo.engine.paths import expanded
from macpo.engine.run.folder import folder_of
from macpo.engine.run.manifest import Manifest
from macpo.recipe_kinds import AnyRecipe
from macpo.standalone.config import StandaloneRecipe

METHOD = "MACPO (multi-agent contrastive preference optimisation, [arXiv 2410.07672](https://arxiv.org/abs/2410.07672))"
NEGATIVE = "This is a **negative** policy: it was trained to behave badly, to supply hard negatives. Do not deploy it."
LICENCE = (
    "This card grants no licence. The terms of the base model and of the data apply; read them before you share it."
)
SCORE = (
    "The logit is the reward of the last response: of the prompt with its generation prefix, the response, and `{end}` "
    "if the response ended by itself, and of nothing that a template writes after that"
)
_TAGS = {"sft": "sft", "reward": "reward-model"}
_HIDDEN = {"save_every_steps", "microbatch_tokens", "spike_sigma", "on_spike"}  # change speed and safety, not weights
_ABOUT = {"role", "iteration"}


@dataclass(frozen=True, slots=True)
class Exported:
    """A policy of a run: its weights, whose it is, and the stages that trained and evaluated it (None: none did)."""

    ref: PolicyRef
    settings: AgentSettings
    agent: str
    policy: str
    """`positive` or `negative`."""
    iteration: int | None
    trained_by: str | None
    evaluated_by: str | None
    base: str
    """Folder or Hub id of the agent's base model."""


def model_card(
    recipe: AnyRecipe, run_dir: Path, policy: Exported, *, base_name: str, is_adapter: bool, chat: Chat | None
) -> str:
    """The text of the card; `chat`: the policy's tokenizer and template, None where they are not here."""
    agent, settings, iteration = policy.agent, policy.settings, policy.iteration
    training = {} if policy.trained_by is None else Manifest.read(folder_of(run_dir, policy.trained_by)).settings
    evaluated = policy.evaluated_by
    metrics = {} if evaluated is None else read_json(folder_of(run_dir, evaluated) / "evaluation.json")
    is_reward = recipe.recipe == "reward"
    title = agent if isinstance(recipe, StandaloneRecipe) else f"{agent}, {policy.policy} policy"
    if iteration is not None and not isinstance(recipe, StandaloneRecipe):
        title += f", iteration {iteration} of {recipe.iterations}"
    tags = ["macpo", _TAGS.get(recipe.recipe, "preference-optimisation")]
    tags += ["weak-to-strong"] if recipe.recipe == "macpo" else []
    data = ModelCardData(
        base_model=base_name,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=tags,
    )
    made = f"made by macpo {__version__} with seed {recipe.seed}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"{_kind(recipe, agent)}, {made}.",
        *([NEGATIVE] if policy.policy == "negative" else []),
        f"- Base model: `{printable(base_name)}`{_licence_of(settings)}\n- Method: {_method(recipe, training)}\n"
        f"- Data: {_data(recipe)}\n- Prompts and responses together up to {recipe.context_tokens:,} tokens"
        + ("" if chat is None else _reading(settings.template or recipe.template, chat, is_reward)),
        "## Training\n\n" + (_table("setting", _flat(training)) if training else _untrained(settings, policy.policy)),
        *(
            ["## Evaluation\n\nMeasured by the run on held-out prompts.\n\n" + _table("metric", _numbers(metrics))]
            if metrics
            else []
        ),
        f"## Licence\n\n{LICENCE}",
    ]
    return "\n".join(map(printable, "\n\n".join(parts).split("\n"))) + "\n"


def _reading(name: str, chat: Chat, is_reward: bool) -> str:
    name = Path(name).name if Path(name).is_absolute() else name
    template = f"\n- Chat template: {_template(name, chat)}"
    if is_reward:
        end = chat.tokenizer.convert_ids_to_tokens(chat.eos_id)
        return f"{template}\n- {SCORE.format(end=end)}"
    return f"{template}\n- A response ends with {_ending(chat)}"


def _template(name: str, chat: Chat) -> str:
    """Which template the tokenizer here carries, and what is written into it."""
    said = f"`{name}`, in `chat_template.jinja` as training used it"
    if chat.arguments:
        said += ", with " + ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in chat.arguments.items())
    return said + (f", with the date {chat.date.isoformat()}" if chat.dated else "")


def _ending(chat: Chat) -> str:
    """The tokens at which generation stops, that of training first."""
    first, *others = (f"`{token}`" for token in chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)))
    also = f"; generation stops at {', '.join(others)} too" if others else ""
    return f"{first} (`eos_token_id` in `generation_config.json`){also}"


def _kind(recipe: AnyRecipe, agent: str) -> str:
    if isinstance(recipe, StandaloneRecipe):
        return "A reward model" if recipe.recipe == "reward" else "A policy of one training run"
    role = "student" if agent == recipe.student.name else "ceiling" if agent == "ceiling" else "teacher"
    return f"The {role} of a run of {METHOD}"


def _method(recipe: AnyRecipe, training: Mapping[str, Any]) -> str:
    optim = training.get("optim")
    if optim is None:
        return "not trained in this run"
    if "center_rewards_coefficient" in optim:
        return "Bradley-Terry on human pairs: -log sigmoid(chosen - rejected reward)"
    names = PreferenceSettings.model_fields.keys() & optim.keys()
    if "loss" not in names:
        return "supervised fine-tuning: mean NLL of the responses' tokens"
    return f"preference optimisation, loss `{optim['loss']}`, beta {optim['beta']:g}, reference `{optim['reference']}`"


def _data(recipe: AnyRecipe) -> str:
    data = recipe.data
    if data.path is None:
        return "the project's demo world: text from a seeded grammar"
    return ", ".join(
        [f"`{printable(data.path)}`", *([f"subset `{data.subset}`"] if data.subset else []), f"split `{data.split}`"]
    )


def _licence_of(settings: AgentSettings) -> str:
    """What the base model's own folder says about its licence; nothing where it is no folder or says nothing."""
    folder = expanded(settings.model or "")
    readme = folder / "README.md"
    if settings.model is None or not readme.is_file():
        return ""
    head = readme.read_text(encoding="utf-8", errors="replace").split("---")
    lines = [line for line in head[1].splitlines() if line.startswith("license:")] if len(head) > 2 else []
    return f" (its card says `{lines[0].strip()}`)" if lines else ""


def _untrained(settings: AgentSettings, policy: str) -> str:
    ready = settings.negative if policy == "negative" else settings.positive
    return f"Taken as it was given: `{ready or settings.model}`."


def _flat(training: Mapping[str, Any]) -> dict[str, Any]:
    """The stage's own settings that shape the weights, one level deep."""
    found = {f"tuning.{name}": value for name, value in training.get("tuning", {}).items()}
    found |= {name: value for name, value in training.get("optim", {}).items() if name not in _HIDDEN}
    found |= {name: training[name] for name in ("dtype", "seed") if name in training}
    return {name: value for name, value in found.items() if value is not None}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in metrics.items() if name not in _ABOUT and isinstance(v, int | float)}


def _table(name: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | value |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {_shown(value)} |" for key, value in rows.items()])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text, 1000).replace("|", "\\|")
