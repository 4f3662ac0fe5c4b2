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

import numpy as np

from macpo.data.columns import check_read
from macpo.data.preferences import (
    PAIR_COLUMNS,
    SIDES,
    alpaca_prompt,
    answer_of,
    load_preferences,
    messages_of,
    prompt_of,
    sharegpt_messages,
    with_system,
)
from macpo.data.prompts import Repeats
from macpo.data.rows import EmptyText, Row, Source
from macpo.data.spool import Records, Spool, whole
from macpo.engine.data.records import Example, Message, Prompt
from macpo.engine.errors import ConfigError, DataError

log = logging.getLogger("macpo.data")


def load_examples(
    source: Source | str | Path,
    *,
    format: str = "auto",
    preference: str = "better",
    empty: str = "auto",
    contradictions: str = "keep",
) -> tuple[Records[Example], dict[str, int]]:
    """Return the examples in the order of the rows, and counts; arguments are those of `load_preferences`.

    `preference` and `contradictions` are about pairs alone.
    Counts: `rows`, `examples`, `prompts` (distinct), `duplicate_rows` (kept), `empty_dropped` where there are any, or
    those of `load_preferences` for pairs.
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
    spool, repeats = Spool(Example), Repeats()
    if format in SIDES:
        pairs, counts = load_preferences(source, preference=preference, empty=empty, contradictions=contradictions)
        for index, pair in enumerate(pairs):
            spool.add(Example(pair.prompt, getattr(pair, format)), *pairs.where(index))
        return whole(spool), counts
    check_read(source.columns, format, _READS[format])
    found = Counter(rows=0)
    for row in rows:
        found["rows"] += 1
        try:
            prompt, answer = FORMATS[format](row)
        except EmptyText:
            if empty != "drop":
                raise
            found["empty_dropped"] += 1
            continue
        if not prompt or prompt[-1]["role"] != "user":
            row.fail("prompt", "what precedes the answer does not end with the user's message", "reorder the dialogue")
        example = Example(Prompt.of(with_system(row, prompt)), answer)
        spool.add(example, row.file, row.line)
        repeats.add(example)
    examples = whole(spool)
    if not examples:
        what = ", ".join(f"{name}={n}" for name, n in found.items() if n) or "it has no rows"
        raise DataError(f"no example is left ({what})", "check the file and data.format", file=str(path))
    found["examples"] = len(examples)
    found["prompts"] = len(np.unique(examples.ids))
    found["duplicate_rows"] = int(repeats.found()[0].sum())
    noted = {name: found[name] for name in ("duplicate_rows", "empty_dropped") if found[name]}
    if noted:
        log.warning("%s: %d examples of %d rows; %s", Path(path).name, len(examples), found["rows"], noted)
    return examples, dict(found)


def _detect(row: Row) -> str:
    has = {name for name, value in row.fields.items() if value is not None} or row.fields.keys()
    if {"chosen", "rejected"} <= has or {"response_0", "response_1"} <= has:
        return "chosen"
    if "instruction" in has and isinstance(row.fields.get("output"), list):
        return "chosen"
    has |= {"response", "completion"} & row.fields.keys()  # null there is an empty answer
    for format, keys in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("response", {"prompt", "response"}),
        ("response", {"prompt", "completion"}),
    ):
        if keys <= has:
            return format
    missing = (
        ["response"] if "prompt" in has else ["prompt", *([] if {"response", "completion"} & has else ["response"])]
    )
    problem = "missing, and the keys fit none of the formats messages, response, alpaca, sharegpt, chosen"
    row.missing(missing[0], problem, *missing[1:])


def _last(row: Row, field: str, messages: list[Message]) -> tuple[list[Message], str]:
    *before, answer = messages
    if answer["role"] != "assistant":
        row.fail(field, f"the last message is from {answer['role']!r}, not the assistant", "end with the answer")
    return before, answer_of(row, field, answer["content"])


def _messages(row: Row) -> tuple[list[Message], str]:
    if not isinstance(row.fields.get("messages"), list):
        row.fail("messages", "not a list of chat messages")
    return _last(row, "messages", messages_of(row, "messages"))


def _response(row: Row) -> tuple[list[Message], str]:
    field = "response" if row.fields.get("response") is not None else "completion"
    if row.fields.get(field) is None:
        field = "response" if "response" in row.fields else "completion"
    value: Any = row.fields.get(field)
    if not isinstance(value, list):
        return prompt_of(row), answer_of(row, field)
    between, answer = _last(row, field, messages_of(row, field))
    return prompt_of(row) + between, answer


def _alpaca(row: Row) -> tuple[list[Message], str]:
    return alpaca_prompt(row), answer_of(row, "output")


def _sharegpt(row: Row) -> tuple[list[Message], str]:
    return _last(row, "conversations", sharegpt_messages(row))


FORMATS: dict[str, Callable[[Row], tuple[list[Message], str]]] = {
    "messages": _messages,
    "response": _response,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_READS = {
    "messages": ("messages", "system"),
    "response": ("prompt", "response", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system"),
}
COLUMNS = ["messages", "prompt", "response", "completion", "instruction", "input", "output", "system", "history"]
COLUMNS += ["conversations"]
