"""From the settings of a judge to a judge that can be asked, and what asking it will cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.judging.costs import Cost, Prices, cost_of
from macpo.judging.judge import AskingJudge
from macpo.judging.logprob import LogprobJudge, VerdictModel
from macpo.judging.questions import Comparison, JudgePrompt
from macpo.judging.replies import Replies
from macpo.judging.server import Endpoint
from macpo.judging.settings import JudgesFile, LocalJudge, ServerJudge
from macpo.recipe_kinds import AnyRecipe

AnyJudge: TypeAlias = AskingJudge | LogprobJudge


def chosen(recipe: AnyRecipe, name: str, file: Path | None) -> ServerJudge | LocalJudge:
    """The settings of the judge of that name, in the recipe or in a file of judges.

    Raises:
        ConfigError: no such judge, or a file that holds something else.
    """
    if file is not None:
        judges: Sequence[ServerJudge | LocalJudge] = recipes.load(file, JudgesFile).judges
    else:
        judges = recipe.evaluation.judges if isinstance(recipe, Recipe) else ()
    found = next((judge for judge in judges if judge.name == name), None)
    if found is None:
        known = ", ".join(judge.name for judge in judges)
        fix = (
            f"use one of {known}" if known else "name it in evaluation.judges of RUN/recipe.yaml, or in a --judges file"
        )
        raise ConfigError(f"there is no judge {name!r}", fix, field="--judge")
    return found


@contextlib.contextmanager
def opened(
    settings: ServerJudge | LocalJudge, recipe: AnyRecipe, replies: Replies | None, world: World
) -> Iterator[AnyJudge]:
    """The judge, ready to be asked; weights and the server's key are read when the first question is.

    Raises:
        ConfigError: a prompt, template, model or key that cannot be used.
    """
    if isinstance(settings, LocalJudge):
        model = VerdictModel(settings, recipe.compute, trust_remote_code=recipe.trust_remote_code)
        yield LogprobJudge(model, JudgePrompt(settings.prompt, "at once"), replies, world)
        return
    ask = Endpoint(
        settings.base_url,
        settings.model,
        api_key_env=settings.api_key_env,
        timeout_s=settings.timeout_s,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
    )
    with contextlib.closing(ask):
        yield AskingJudge(
            ask,
            JudgePrompt(settings.prompt),
            replies,
            {name: getattr(settings, name) for name in ("model", "temperature", "max_tokens")},
            votes=settings.votes,
            max_failure_rate=settings.max_failure_rate,
            workers=settings.workers,
        )


def cost(judge: AnyJudge, settings: ServerJudge | LocalJudge, comparisons: Sequence[Comparison]) -> Cost:
    """What the questions cost that have yet to be asked; a question that occurs twice is asked once."""
    questions = dict(judge.keyed(comparisons))
    to_ask = [text for key, text in questions.items() if judge.replies is None or judge.replies.get(key) is None]
    known = len(questions) - len(to_ask)
    if isinstance(judge, LogprobJudge):
        return cost_of(to_ask, known, 0, count=lambda question: judge.model.group(question).num_tokens)
    assert isinstance(settings, ServerJudge)
    return cost_of(to_ask, known, settings.max_tokens)


def prices(settings: ServerJudge | LocalJudge, tokens_in: float | None, tokens_out: float | None) -> Prices | None:
    """Raises ConfigError for one price without the other, a negative one, or prices of a local judge."""
    if tokens_in is None and tokens_out is None:
        return None
    if isinstance(settings, LocalJudge):
        raise ConfigError(f"{settings.name} is a model on this machine", "leave out the prices", field="--price-in")
    if tokens_in is None or tokens_out is None or min(tokens_in, tokens_out) < 0:
        raise ConfigError(
            f"got {tokens_in} in and {tokens_out} out",
            "give both, for a million tokens",
            field="--price-in, --price-out",
        )
    return Prices(tokens_in, tokens_out)


def title(settings: ServerJudge | LocalJudge) -> str:
    """The judge in words, for tables and the report."""
    prompt = Path(settings.prompt).name
    if isinstance(settings, LocalJudge):
        return (
            f"{Path(settings.model).name}, prompt {prompt}, by the log-probs of its verdict, margin {settings.margin:g}"
        )
    heat = "the server's temperature" if settings.temperature is None else f"temperature {settings.temperature:g}"
    return f"{settings.model}, prompt {prompt}, {heat}" + (f", {settings.votes} votes" if settings.votes > 1 else "")
