"""`macpo chat RUN`: talk to a policy of a run, or to two at once, in the terminal or through a pipe.

    macpo chat runs/mine                                        # the student as it is after the last iteration
    macpo chat runs/mine --agent teacher0 --iteration 1
    macpo chat runs/mine --beside student@0                     # and beside it as it was at the start
    echo "How do I plant a hedge?" | macpo chat runs/mine

A policy answers through its own template, from as much of the dialogue as the run leaves room for, sampled as the run
samples. A response is a function of the policy, the dialogue and the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from macpo.commands.export import Choice
from macpo.commands.policies.opening import policy_of_run
from macpo.commands.policies.policy import Policy
from macpo.engine.console import say
from macpo.engine.data.messages import Message
from macpo.engine.errors import ConfigError, DataError, printable
from macpo.recipe_kinds import load
from macpo.report.policy_names import parts_of_name

HELP = "/new begins a new dialogue, /quit or Ctrl-D ends"


@dataclass
class Voice:
    """One policy in a dialogue."""

    policy: Policy
    messages: list[Message] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.policy.name

    def response(self, text: str) -> str:
        """The policy's response to the dialogue so far and this message, which both become part of it.

        Raises DataError, and leaves the dialogue as it was, where the template refuses it or no room is left.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        (output,) = self.policy.generate(messages)
        response = (output.text or "").strip()
        self.messages = [*messages, {"role": "assistant", "content": response}]
        return response


def chat(arguments: argparse.Namespace) -> None:
    """Answer what stands on standard input, line by line.

    Raises:
        ConfigError (2): no such policy, one that a server answers for, or a run of a reward model.
    """
    recipe = load(arguments.run)
    choices = [Choice(arguments.agent, arguments.iteration, arguments.policy, arguments.arm)]
    if arguments.beside:
        arm, agent, iteration = parts_of_name(arguments.beside, field="--beside")
        choices.append(Choice(agent, -1 if iteration is None else iteration, arm=arm))
    seed = recipe.seed if arguments.seed is None else arguments.seed
    voices = []
    for choice in choices:
        try:
            voices.append(Voice(policy_of_run(arguments.run, recipe, choice, seed=seed)))
        except ConfigError as error:
            if choice is choices[0]:
                raise
            raise ConfigError(problems=[replace(each, field="--beside") for each in error.problems]) from error
    if sys.stdin.isatty():
        say(f"{' and '.join(voice.name for voice in voices)}: {HELP}", error=False)
    talk(voices, _typed() if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin))


def talk(voices: Sequence[Voice], lines: Iterable[str]) -> None:
    """Print every policy's response to each line; two stand side by side on a terminal."""
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
            _show([(voice.name, _response(voice, text)) for voice in voices])


def _response(voice: Voice, text: str) -> str:
    try:
        return voice.response(text) or "(no answer)"
    except DataError as error:
        return str(error)


def _show(responses: Sequence[tuple[str, str]]) -> None:
    clean = [(name, "\n".join(printable(line) for line in text.split("\n"))) for name, text in responses]
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
