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

from macpo.data.preferences import (
    PAIR_COLUMNS,
    alpaca_prompt,
    last_message,
    load_preferences,
    messages_of,
    prompt_before_answer,
    prompt_of,
    sharegpt_messages,
    text_of,
)
from macpo.data.rows import Row, Source
from macpo.engine.data.messages import Message, parts_of
from macpo.engine.data.records import Example
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
        return [pair.example(format) for pair in pairs], counts
    found = Counter(rows=0)
    examples: list[Example] = []
    for row in rows:
        found["rows"] += 1
        prompt, answer = FORMATS[format](row)
        parts = parts_of(answer)
        if not answer["content"].strip() and parts is None:
            row.fail("response", "the answer is empty or white space", "remove the row")
        examples.append(Example(prompt_before_answer(row, prompt), answer["content"], parts=parts))
    if not examples:
        raise DataError("it has no rows", "check the file", file=str(path))
    found["examples"] = len(examples)
    found["prompts"] = len({example.prompt.id for example in examples})
    found["duplicate_rows"] = len(examples) - len({(e.prompt.id, e.answer, str(e.parts)) for e in examples})
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


def _messages(row: Row) -> tuple[list[Message], Message]:
    if not isinstance(row.fields.get("messages"), list):
        row.fail("messages", "not a list of chat messages")
    return last_message(row, "messages", messages_of(row, "messages"))


def _response(row: Row) -> tuple[list[Message], Message]:
    field = "response" if "response" in row.fields else "completion"
    if not isinstance(row.fields.get(field), list | dict):
        return prompt_of(row), _said(text_of(row, field))
    between, answer = last_message(row, field, messages_of(row, field))
    return prompt_of(row) + between, answer


def _alpaca(row: Row) -> tuple[list[Message], Message]:
    return alpaca_prompt(row), _said(text_of(row, "output"))


def _sharegpt(row: Row) -> tuple[list[Message], Message]:
    return last_message(row, "conversations", sharegpt_messages(row))


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


FORMATS: dict[str, Callable[[Row], tuple[list[Message], Message]]] = {
    "messages": _messages,
    "response": _response,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
COLUMNS = ["messages", "prompt", "response", "completion", "instruction", "input", "output", "system", "history"]
COLUMNS += ["conversations"]
