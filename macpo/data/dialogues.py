"""Parts of a row as chat messages: what every layout of rows is made of. Text is kept to the character."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from macpo.data.rows import EmptyText, Row
from macpo.engine.data.messages import Message, message_of, parts_of, tools_of, with_tools
from macpo.engine.data.records import Prompt, prompt_id
from macpo.engine.errors import DataError, shown

LAST = "\n\nAssistant:"
"""What the response of a dialogue of HH-RLHF follows."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_EMPTY_FIX = "remove the row, or set data.empty: drop"
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

T = TypeVar("T")


def text_of(row: Row, field: str) -> str:
    """Return a field's text. Raises as `checked_text` does, and DataError for a field that is missing."""
    if field not in row.fields:
        row.fail(field, "the field is missing")
    return checked_text(row, field, row.fields[field])


def checked_text(row: Row, field: str, value: Any) -> str:
    """Return a text to the character. Raises EmptyText for null, DataError for anything else."""
    if value is None:
        fix = f"correct the row, set data.empty: drop, or map the name: {row.mapping(field)}"
        row.fail(field, "null", fix, EmptyText)
    if not isinstance(value, str):
        row.fail(field, f"not text but {type(value).__name__}: {shown(value)}")
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        row.fail(field, f"lone surrogate U+{ord(value[error.start]):04X}", "remove or pair it")
    return value


def user_turn(row: Row, field: str, text: str) -> Message:
    """Return a user's message. Raises EmptyText for white space."""
    if not text.strip():
        row.fail(field, "the prompt is empty or white space", _EMPTY_FIX, EmptyText)
    return {"role": "user", "content": text}


def response_of(row: Row, field: str, response: str | Message | None = None) -> Message:
    """Return a response, the field's own unless one is given, as the assistant's message.

    Raises EmptyText for one of white space that has no further parts, such as tool calls.
    """
    given = text_of(row, field) if response is None else response
    message = {"role": "assistant", "content": given} if isinstance(given, str) else given
    if not message["content"].strip() and parts_of(message) is None:
        row.fail(field, "the response is empty or white space", _EMPTY_FIX, EmptyText)
    return message


def prompt_before_response(row: Row, messages: Sequence[Message]) -> Prompt:
    """Return a row's prompt with its `system` text and `tools`. Raises where a response cannot follow it."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        problem = (
            "its last message is not the user's"
            if messages
            else "what precedes the response does not end with the user's message"
        )
        fix = "end the prompt with the user's message; a response that was begun belongs into the responses"
        row.fail("prompt", problem, fix)
    if not any(message["role"] == "user" and message["content"].strip() for message in reversed(messages)):
        row.fail("prompt", "the prompt is empty or white space", _EMPTY_FIX, EmptyText)
    messages = _with_system(row, messages)
    if row.fields.get("tools") is not None:
        messages = with_tools(messages, _part(row, "tools", tools_of, row.fields["tools"]))
    return Prompt(prompt_id(messages), tuple(messages), (row.file, row.line))


def _with_system(row: Row, messages: Sequence[Message]) -> Sequence[Message]:
    """Return a dialogue that begins with the row's `system` text, if there is any and it does not so already."""
    if row.fields.get("system") is None or not (text := text_of(row, "system")).strip():
        return messages
    if messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"].strip() != text.strip():
            row.fail("system", "it is not the system message that the dialogue begins with", "keep one of the two")
        return messages
    return [{"role": "system", "content": text}, *messages]


def alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two dialogues are the same but for outer white space."""
    if one is other or len(one) != len(other):
        return one is other
    return all(a == b or _stripped(a) == _stripped(b) for a, b in zip(one, other, strict=True))


def _stripped(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def messages_of(row: Row, field: str) -> list[Message]:
    """Parse a list of chat messages, or a single one, with all their parts."""
    given = row.fields[field]
    messages = [_part(row, field, message_of, each) for each in (given if isinstance(given, list) else [given])]
    if not messages:
        row.fail(field, "an empty list of messages", "give at least one message, or set data.empty: drop", EmptyText)
    return messages


def _part(row: Row, field: str, parse: Callable[[Any], T], value: Any) -> T:
    """Parse a part of a row; an error names the row, and text that is null is EmptyText."""
    try:
        return parse(value)
    except DataError as error:
        found = error.problems[0]
        is_null = found.field == "content" and value.get("content") is None
        fix = f"{found.fix}, or set data.empty: drop" if is_null else found.fix
        row.fail(field, found.message, fix, EmptyText if is_null else DataError)


def last_message(row: Row, field: str, messages: list[Message]) -> tuple[list[Message], Message]:
    """Return what precedes the response, and the response."""
    *before, response = messages
    if response["role"] != "assistant":
        row.fail(field, f"the last message is from {response['role']!r}, not the assistant", "end with the response")
    return before, response_of(row, field, response)


def prompt_of(row: Row) -> list[Message]:
    """Parse the prompt: a user's text, an HH dialogue that ends before its response, or chat messages."""
    field = "messages" if row.fields.get("prompt") is None and row.fields.get("messages") is not None else "prompt"
    if isinstance(row.fields.get(field), list | dict):
        return messages_of(row, field)
    text = text_of(row, field)
    if is_hh(text):
        return turns(f"\n\n{text.strip().removesuffix(LAST)}")
    return [user_turn(row, field, text)]


def is_hh(prompt: Any) -> bool:
    """Whether a prompt is a dialogue of HH-RLHF that ends before its response."""
    return isinstance(prompt, str) and prompt.lstrip()[:6] == "Human:" and prompt.rstrip().endswith(LAST)


def turns(dialogue: str) -> list[Message]:
    """Parse "\\n\\nHuman: …\\n\\nAssistant: …" into chat messages; successive turns of one speaker are joined."""
    parts = _TURN.split(dialogue)[1:]
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{said(content)}"
        messages.append({"role": role, "content": said(content)})
    return messages


def said(text: str) -> str:
    """Return what a speaker said after "Human:" or "Assistant:", without the blank that the layout writes before it."""
    return text.removeprefix(" ")


def alpaca_prompt(row: Row) -> list[Message]:
    """Build the messages: earlier rounds, then instruction and input as the user's message."""
    messages: list[Message] = []
    history = row.fields.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            row.fail("history", f"must be a list of [question, response], got {shown(turn, 40)}")
        messages.append(user_turn(row, "history", checked_text(row, "history", turn[0])))
        messages.append({"role": "assistant", "content": checked_text(row, "history", turn[1])})
    parts = [text_of(row, "instruction"), text_of(row, "input") if row.fields.get("input") else ""]
    messages.append(user_turn(row, "instruction", "\n".join(filter(None, parts))))
    return messages


def sharegpt_messages(row: Row) -> list[Message]:
    """Return the chat messages of `conversations`."""
    turns = row.fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", "not a list of messages", 'write [{"from": "human", "value": "…"}, …]')
    return [sharegpt_message(row, "conversations", turn) for turn in turns]


def sharegpt_message(row: Row, field: str, turn: Any) -> Message:
    """Parse one {"from", "value"}. Raises DataError for another speaker."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or turn["from"] not in _SPEAKERS:
        row.fail(field, f"not a message: {shown(turn)}", f"each is {{from: {' or '.join(_SPEAKERS)}, value: text}}")
    return {"role": _SPEAKERS[turn["from"]], "content": checked_text(row, field, turn.get("value"))}
