"""Settings of judges: `evaluation.judges` of a recipe, or a file of their own for a run whose recipe names none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, model_validator

from macpo.engine.config import Fraction, Name, PositiveInt, Settings
from macpo.engine.connection import url_problem
from macpo.engine.data.templates import Template
from macpo.engine.paths import HubPath, absolute, relative_to

PROMPTS = ("pairwise", "helpful", "harmless")
"""Prompts that come with the project: `macpo/judging/prompts/NAME.txt`."""


def _prompt(text: str, info: ValidationInfo) -> str:
    """The name of a prompt as it is; the path of a file becomes absolute."""
    return text if text in PROMPTS else absolute(text, relative_to(info))


class _Judge(Settings):
    """What every judge has."""

    name: Name
    """How the judge is called on the command line and in the report; also the name of its folder."""
    prompt: Annotated[str, AfterValidator(_prompt)] = "pairwise"
    """`pairwise`, `helpful`, `harmless`, or a text file with {conversation}, {a} and {b}."""
    limit: PositiveInt | None = None
    """Judge only so many of the test prompts, those with the smallest content hashes; default all."""
    max_failure_rate: Fraction = 0.05
    """The judging stops as soon as more than this share of an opponent's comparisons has failed."""


class ServerJudge(_Judge):
    """A model behind an OpenAI-compatible server, which explains and then writes its verdict."""

    server: Literal["openai"] = "openai"
    """The protocol: POST to `{base_url}/chat/completions`."""
    base_url: str
    """Such as https://host/v1."""
    model: str
    """The model's name on the server. It stands for the weights: give others another name."""
    api_key_env: str | None = None
    """Name of an environment variable with the key; none for servers without one."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """Sent with every question; none leaves it to the server, for models that accept no other than their own."""
    votes: PositiveInt = 1
    """How often each question is asked; the verdict is the majority's."""
    max_tokens: PositiveInt = 512
    """Longest reply; models that think before they write need more."""
    workers: PositiveInt = 4
    """Questions that are open at a time."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for one reply."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> ServerJudge:
        if problem := url_problem(self.base_url, self.api_key_env):
            raise ValueError(f"base_url {problem[0]} Fix: {problem[1]}")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError("votes at temperature 0 would all be the same reply Fix: set temperature, such as 1.0")
        return self


class LocalJudge(_Judge):
    """A causal LM on this machine; its verdict is the likelier of the tokens that say A and B."""

    mode: Literal["logprob"]
    """How it judges: by the log-probs of its verdict."""
    model: HubPath
    """Folder or Hub id of a whole model."""
    template: Template = "auto"
    """Chat template: `auto` (the tokenizer's own, else vicuna), `vicuna`, `chatml`, `plain`, or a jinja file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations; `auto` is bfloat16 on GPUs and float32 on CPUs."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Log-probs (nats) of A and B that are not further apart than this are a tie."""


def _kind(value: Any) -> str:
    is_local = "mode" in value if isinstance(value, dict) else isinstance(value, LocalJudge)
    return "logprob" if is_local else "openai"


JudgeSettings: TypeAlias = Annotated[
    Annotated[ServerJudge, Tag("openai")] | Annotated[LocalJudge, Tag("logprob")], Discriminator(_kind)
]


def distinct(judges: Sequence[ServerJudge | LocalJudge]) -> None:
    """Raise ValueError where two judges have one name, and so one folder."""
    names = [judge.name.lower() for judge in judges]
    if len(set(names)) != len(names):
        got = ", ".join(judge.name for judge in judges)
        raise ValueError(f"judges need distinct names; got {got} Fix: rename one of them")


class JudgesFile(Settings):
    """A file of judges, for `macpo evaluate RUN --judges FILE`."""

    judges: Annotated[tuple[JudgeSettings, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> JudgesFile:
        distinct(self.judges)
        return self
