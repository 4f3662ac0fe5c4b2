"""Prompts as people write them where token ids would do: a string, or chat messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from macpo.engine.data.messages import Message, message_of, split_tools, tools_of, with_tools
from macpo.engine.errors import DataError, shown

Text: TypeAlias = str | Sequence[Message]
"""One user turn, or a dialogue that ends before the response."""


def messages_of(prompt: Text | Sequence[int]) -> list[Message] | None:
    """The chat messages of a prompt; a string becomes one user turn. None for token ids.

    Raises:
        DataError: neither a string nor a sequence, or a message that chat templates cannot write.
    """
    if isinstance(prompt, str):
        return [message_of({"role": "user", "content": prompt})]
    if not hasattr(prompt, "__len__"):
        raise DataError(f"got {shown(prompt)}", "a prompt is a string, chat messages or token ids", field="prompt")
    if not len(prompt) or not isinstance(prompt[0], Mapping):
        return None
    turns, tools = split_tools(list(prompt))  # type: ignore[arg-type]
    return with_tools([message_of(turn) for turn in turns], tools_of(tools))


def prompt_list(prompts: Text | Iterable[Text | Sequence[int]]) -> list[Any]:
    """Prompts as a list; one string or one dialogue becomes a list of one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts)
    return [found] if found and isinstance(found[0], Mapping) else found
