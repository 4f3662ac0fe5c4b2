"""A message of a dialogue: role, text, and the other parts that chat templates write (tool calls, thoughts).

    message_of({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", ...}}]})

Nothing of a message is dropped: a part is kept for the template, or refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from macpo.engine.errors import DataError, shown

Message: TypeAlias = dict[str, Any]
"""{"role": …, "content": text}, and further parts of PARTS; the first message of a dialogue may hold its `tools`."""
ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
PARTS = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
"""What a message may hold besides role and content; templates know these names."""
LINKS = ("tool_call_id", "name")
"""Parts of a tool's message that only say which call it belongs to, so that a template may leave them out."""


def message_of(value: Any) -> Message:
    """Checks one message as data sets write it, and returns it with all its parts.

    Content as a list of `{"type": "text", "text": …}` becomes their text; `content: null` beside tool calls becomes "";
    a part that is null counts as absent; arguments of a tool call that are JSON text become the object they spell.

    Raises:
        DataError: no message; another role; content that is not text; a part that no template would write. The error's
            field is the part's name.
    """
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        fix = f"each message is {{role: {', '.join(ROLES[:-1])} or {ROLES[-1]}, content: text}}"
        raise DataError(f"not a chat message: {shown(value)}", fix, field="role")
    if len(value) == 2 and isinstance(content := value.get("content"), str):  # as nearly all are
        return {"role": value["role"], "content": _string(content, "content")}
    given = {name: part for name, part in value.items() if part is not None}
    unknown = [name for name in given if name not in ("role", "content", *PARTS)]
    if unknown:
        raise DataError(
            f"the {given['role']} message has a part {unknown[0]!r}, which no chat template writes",
            f"remove it from the data; known are {', '.join(PARTS)}",
            field=str(unknown[0]),
        )
    message = {"role": given["role"], "content": _text(given.get("content"), given)}
    for name in PARTS:
        if name in given:
            message[name] = _calls(given[name]) if name == "tool_calls" else _string(given[name], name)
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    return message


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The functions that a dialogue may call: a list of JSON schemas, or JSON text of one; None gives none.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            value = False
    if value is None:
        return []
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"not a list of functions: {shown(value)}", "give a list of JSON schemas", field="tools")
    return [_plain(tool) for tool in value]


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The dialogue with the functions that it may call, as a part of its first message."""
    first, *rest = messages
    return [{**first, "tools": list(tools)}, *rest] if tools else list(messages)


def split_tools(messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The dialogue without the `tools` of its first message, and these; None where it has none."""
    if not messages or "tools" not in messages[0]:
        return [dict(message) for message in messages], None
    first = {name: part for name, part in messages[0].items() if name != "tools"}
    return [first, *(dict(message) for message in messages[1:])], messages[0]["tools"]


def parts_of(message: Message) -> Message | None:
    """An assistant's message if it holds more than its text, else None."""
    return message if len(message) > 2 and any(name in message for name in PARTS) else None


def _text(content: Any, given: Mapping[str, Any]) -> str:
    if content is None:
        if given.get("tool_calls") or any(given.get(name) for name in THOUGHTS):
            return ""
        raise DataError(
            f"null content in the {given['role']} message, and no tool call", "give its text", field="content"
        )
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
                problem = f"the {given['role']} message has a content part {kind!r} that is not text"
                raise DataError(problem, 'give text alone: [{"type": "text", "text": …}]', field="content")
            texts.append(part["text"])
        content = "".join(texts)
    return _string(content, "content")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is not text but {type(value).__name__}: {shown(value)}", "give text", field=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(f"lone surrogate U+{code:04X} in {name}", "remove or pair it", field=name) from None
    return value


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as templates read them: {"type": "function", "function": {"name", "arguments": object}}."""
    calls = []
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            fix = 'each is {"type": "function", "function": {"name": …, "arguments": {…}}}'
            raise DataError(f"not a list of tool calls: {shown(value)}", fix, field="tool_calls")
        function = _plain(function)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = _plain(json.loads(arguments))
            except (ValueError, RecursionError):
                raise DataError(
                    f"the arguments of a call of {function['name']!r} are not JSON: {shown(arguments)}",
                    "give an object",
                    field="tool_calls",
                ) from None
        assert isinstance(call, Mapping)
        calls.append({**_plain(call), "function": function} if "function" in call else {"function": function})
    return calls


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types. Raises DataError for text that no file can hold."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        why = f"it cannot be written as JSON ({error})"
        raise DataError(why, "give plain objects", field="tool_calls") from None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"lone surrogate U+{code:04X} in it", "remove or pair it", field="tool_calls") from None
    return json.loads(text)
