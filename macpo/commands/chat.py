"""`macpo chat RUN`: talk to a policy of a run, or to two at once, in the terminal or through a pipe.

    macpo chat runs/mine                                        # the student as it is after the last iteration
    macpo chat runs/mine --agent teacher0 --iteration 1
    macpo chat runs/mine --beside student@0                     # and beside it as it was at the start
    echo "How do I plant a hedge?" | macpo chat runs/mine

A policy answers through its own template, from as much of the dialogue as the run leaves room for, sampled as the run
samples. An answer is a function of the policy, the dialogue and the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from macpo.commands.export import Choice, agent_settings, chat_of_policy, choose, reading_of
from macpo.config import Recipe
from macpo.engine.config import SamplingSettings
from macpo.engine.console import say
from macpo.engine.data.chat import Chat
from macpo.engine.data.messages import Message
from macpo.engine.errors import ConfigError, DataError, printable
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.generation.vocabulary import check_vocab
from macpo.engine.models.compute import model_cache
from macpo.method.policies import StageAgent
from macpo.recipe_kinds import AnyRecipe, load, plan_of
from macpo.report.policy_names import parts_of_name
from macpo.standalone.config import PolicyRecipe, RewardRecipe

HELP = "/new begins a new dialogue, /quit or Ctrl-D ends"


@dataclass
class Voice:
    """One policy in a dialogue."""

    name: str
    chat: Chat
    agent: StageAgent
    sampling: SamplingSettings
    generator: Generator
    seed: int
    messages: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> str:
        """The policy's answer to the dialogue so far and this message, which both become part of it.

        Raises DataError, and leaves the dialogue as it was, where the template refuses it or no room is left.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.chat.limited_prompt_ids(messages, self.agent.max_prompt_tokens)
        if ids is None:
            room = f"{self.agent.max_prompt_tokens} tokens"
            raise DataError(f"not even the end of the message fits into {room}", "write less, or /new", field=self.name)
        room_tokens = self.agent.context_tokens - len(ids)
        sampling = self.sampling.model_copy(update={"max_new_tokens": min(self.sampling.max_new_tokens, room_tokens)})
        stops = tuple(sorted(self.chat.stop_ids))
        params = SamplingParams.of(sampling, seed=self.seed, stop_token_ids=stops)
        (output,) = self.generator.generate([ids], params)
        answer = self.chat.text(output.samples[0].token_ids).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def chat(arguments: argparse.Namespace) -> None:
    """Answer what stands on standard input, line by line.

    Raises:
        ConfigError (2): no such policy, one that a server answers for, or a run of a reward model.
    """
    recipe = load(arguments.run)
    if isinstance(recipe, RewardRecipe):
        raise ConfigError("a reward model gives scores and writes no answers", "name another run", file=arguments.run)
    choices = [Choice(arguments.agent, arguments.iteration, arguments.policy, arguments.arm)]
    if arguments.beside:
        arm, agent, iteration = parts_of_name(arguments.beside, field="--beside")
        choices.append(Choice(agent, -1 if iteration is None else iteration, arm=arm))
    seed = recipe.seed if arguments.seed is None else arguments.seed
    voices = []
    for choice in choices:
        try:
            voices.append(_voice(arguments.run, recipe, choice, seed))
        except ConfigError as error:
            if choice is choices[0]:
                raise
            raise ConfigError(problems=[replace(each, field="--beside") for each in error.problems]) from error
    if sys.stdin.isatty():
        say(f"{' and '.join(voice.name for voice in voices)}: {HELP}", error=False)
    talk(voices, _typed() if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin))


def talk(voices: Sequence[Voice], lines: Iterable[str]) -> None:
    """Print every policy's answer to each line; two stand side by side on a terminal."""
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            for voice in voices:
                voice.messages = []
        elif text.startswith("/"):
            say(HELP)
        elif text:
            _show([(voice.name, _answer(voice, text)) for voice in voices])


def _answer(voice: Voice, text: str) -> str:
    try:
        return voice.answer(text) or "(no answer)"
    except DataError as error:
        return str(error)


def _show(answers: Sequence[tuple[str, str]]) -> None:
    clean = [(name, "\n".join(printable(line) for line in text.split("\n"))) for name, text in answers]
    if len(clean) == 1 or not sys.stdout.isatty():
        for name, text in clean:
            print(f"{name}: {text}", flush=True)
        return
    table = Table(*(name for name, _ in clean), expand=True)
    table.add_row(*(Text(text) for _, text in clean))
    Console().print(table)


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrows and history in input())
    while True:
        try:
            yield input("you: ")
        except EOFError:
            print()
            return


def _voice(run_dir: Path, recipe: AnyRecipe, choice: Choice, seed: int) -> Voice:
    agent = choice.agent or recipe.agents[-1].name
    settings = agent_settings(recipe, agent)
    if settings.served is not None:
        fix = "ask its server, or name another agent"
        raise ConfigError(f"{agent} is served: its weights are not here", fix, field="--agent")
    chosen = choose(run_dir.absolute(), plan_of(recipe, must_exist=False), settings, replace(choice, agent=agent))
    reading = reading_of(recipe, settings)
    template = chat_of_policy(recipe, chosen, reading)
    policy = model_cache(recipe.compute, recipe.trust_remote_code).policy(chosen.ref)
    check_vocab(policy.base, template.tokenizer)
    name = f"{agent} (negative)" if chosen.iteration is None else f"{agent}@{chosen.iteration}"
    return Voice(
        f"{choice.arm}.{name}" if choice.arm else name,
        template,
        reading,
        (recipe.sampling if isinstance(recipe, Recipe | PolicyRecipe) else None) or SamplingSettings(),
        Generator(policy, template.tokenizer, max_batch=1),
        seed,
    )
