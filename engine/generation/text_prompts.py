"""Texts as prompts of a generator: their token ids, the tokens that end a response, and the text that comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from macpo.engine.data.chat import Chat
from macpo.engine.data.texts import Text, messages_of, prompt_list
from macpo.engine.generation.params import SamplingParams, one_each
from macpo.engine.generation.request import Output


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Prompts as token ids, each with its params and the template that wrote it; None for one that was given as ids."""

    prompts: list[Sequence[int]]
    params: list[SamplingParams]
    chats: list[Chat | None]


def tokenised(
    prompts: Text | Iterable[Text | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    chat: Callable[[], Chat],
) -> Tokenised:
    """The prompts as token ids; texts through the template, whose end tokens then end their responses too.

    Args:
        chat: called where a prompt is a text.

    Raises:
        DataError: what the template cannot write. ConfigError: numbers of prompts and params that differ.
    """
    given = prompt_list(prompts)
    found = Tokenised([], [], [])
    for prompt, one in zip(given, one_each(params, len(given)), strict=True):
        messages = messages_of(prompt)
        template = chat() if messages is not None else None
        found.prompts.append(prompt if template is None else template.prompt_ids(messages or ()))
        found.params.append(one if template is None else ended_by(one, template))
        found.chats.append(template)
    return found


def ended_by(params: SamplingParams, chat: Chat) -> SamplingParams:
    """The params with the template's end tokens among those that end a response, unless it ignores EOS."""
    return params if params.ignore_eos else replace(params, stop_token_ids=(*params.stop_token_ids, *chat.stop_ids))


def unframed(outputs: list[Output], chats: Sequence[Chat | None]) -> list[Output]:
    """The outputs, their texts without what each template writes around a response."""
    for output, chat in zip(outputs, chats, strict=True):
        for sample in output.samples if chat is not None else ():
            sample.text = chat.unframed(sample.text or "")  # type: ignore[union-attr]
    return outputs
