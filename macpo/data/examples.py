"""Prompts with one response each, for supervised fine-tuning.

    examples, counts = load_examples("chats.jsonl")

Formats, told apart by the keys of the first row:

    messages   {"messages": chat messages that end with the assistant's}
    response   {"prompt", "response"} or {"prompt", "completion"}: text, or lists of chat messages
    alpaca     {"instruction", "input", "output": text}, also with "system" and "history"
    sharegpt   {"conversations": [{"from", "value"}, …]}, also with "system"
    chosen     any layout of preference pairs (macpo/data/preferences.py): the better response
    rejected   the same, the worse response

The last response of a dialogue is learnt; what comes before it is the prompt.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from macpo.data.preferences import (
    PAIR_COLUMNS,
    alpaca_prompt,
    load_preferences,
    messages_of,
    prompt_of,
    sharegpt_messages,
    text_of,
)
from macpo.data.rows import Row, Source
from macpo.engine.data.records import Example, Message, Prompt
from macpo.engine.errors import ConfigError, DataError

log = logging.getLogger("macpo.data")

SIDES = ("chosen", "rejected")


def load_examples(
    source: Source | str | Path, *, format: str = "auto", preference: str = "better"
) -> tuple[list[Example], dict[str, int]]:
    """Return the examples in the order of the rows, and counts; arguments are those of `load_preferences`.

    Counts: `rows`, `examples`, `prompts` (distinct), `duplicate_rows` (kept), or those of `load_preferences` for pairs.
    Raises ConfigError for settings and paths, DataError with file, line and field for rows, or if nothing is left.
    """
    source = source if isinstance(source, Source) else Source(source)
    path = source.path
    unknown = set(source.columns) - {*COLUMNS, *PAIR_COLUMNS}
    if unknown:
        known = ", ".join(dict.fromkeys([*COLUMNS, *PAIR_COLUMNS]))
        raise ConfigError(f"got {sorted(unknown)[0]!r}", f"use {known}", field="data.columns")
    rows = source.rows()
    if format == "auto":
        first = next(rows, None)
        if first is None:
            raise DataError("it has no rows", "check the file", file=str(path))
        format = _detect(first)
        rows = itertools.chain([first], rows)
    if format in SIDES:
        pairs, counts = load_preferences(source, preference=preference)
        return [Example(pair.prompt, getattr(pair, format)) for pair in pairs], counts
    found = Counter(rows=0)
    examples: list[Example] = []
    for row in rows:
        found["rows"] += 1
        prompt, answer = FORMATS[format](row)
        if not prompt or prompt[-1]["role"] != "user":
            row.fail("prompt", "what precedes the answer does not end with the user's message", "reorder the dialogue")
        if not answer:
            row.fail("response", "the answer is empty or white space", "remove the row")
        examples.append(Example(Prompt.of(prompt), answer))
    if not examples:
        raise DataError("it has no rows", "check the file", file=str(path))
    found["examples"] = len(examples)
    found["prompts"] = len({example.prompt.id for example in examples})
    found["duplicate_rows"] = len(examples) - len({(example.prompt.id, example.answer) for example in examples})
    if found["duplicate_rows"]:
        log.warning("%s: %d of %d rows are repeated", Path(path).name, found["duplicate_rows"], found["rows"])
    return examples, dict(found)


def _detect(row: Row) -> str:
    has = row.fields.keys()
    if {"chosen", "rejected"} <= has or {"response_0", "response_1"} <= has:
        return "chosen"
    if "instruction" in has and isinstance(row.fields.get("output"), list):
        return "chosen"
    for format, keys in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("response", {"prompt", "response"}),
        ("response", {"prompt", "completion"}),
    ):
        if keys <= has:
            return format
    missing = "response" if "prompt" in has else "prompt"
    row.fail(missing, "missing, and the keys fit none of the formats messages, response, alpaca, sharegpt, chosen")


def _last(row: Row, field: str, messages: list[Message]) -> tuple[list[Message], str]:
    *before, answer = messages
    if answer["role"] != "assistant":
        row.fail(field, f"the last message is from {answer['role']!r}, not the assistant", "end with the answer")
    return before, answer["content"]


def _messages(row: Row) -> tuple[list[Message], str]:
    if not isinstance(row.fields.get("messages"), list):
        row.fail("messages", "not a list of chat messages")
    return _last(row, "messages", messages_of(row, "messages"))


def _response(row: Row) -> tuple[list[Message], str]:
    field = "response" if "response" in row.fields else "completion"
    value: Any = row.fields.get(field)
    if not isinstance(value, list):
        return prompt_of(row), text_of(row, field)
    between, answer = _last(row, field, messages_of(row, field))
    return prompt_of(row) + between, answer


def _alpaca(row: Row) -> tuple[list[Message], str]:
    return alpaca_prompt(row), text_of(row, "output")


def _sharegpt(row: Row) -> tuple[list[Message], str]:
    return _last(row, "conversations", sharegpt_messages(row))


FORMATS: dict[str, Callable[[Row], tuple[list[Message], str]]] = {
    "messages": _messages,
    "response": _response,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
COLUMNS = ["messages", "prompt", "response", "completion", "instruction", "input", "output", "system", "history"]
COLUMNS += ["conversations"]
