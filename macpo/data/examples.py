"""Prompts with one response each, for supervised fine-tuning.

    examples, counts = load_examples("chats.jsonl")

Formats, told apart by the keys of the first row:

    messages   {"messages": chat messages that end with the assistant's}
    response   {"prompt", "response"} or {"prompt", "completion"}: text, or lists of chat messages
    alpaca     {"instruction", "input", "output": text}, also with "history"
    sharegpt   {"conversations": [{"from", "value"}, …]}
    chosen     any layout of preference pairs (macpo/data/pair_layouts.py): the better response
    rejected   the same, the worse response

Each also with "system" and "tools". The last response of a dialogue is learnt; what comes before it is the prompt.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from macpo.data.columns import check_read
from macpo.data.dialogues import (
    alpaca_prompt,
    last_message,
    messages_of,
    prompt_before_response,
    prompt_of,
    response_of,
    sharegpt_messages,
)
from macpo.data.pair_layouts import COLUMNS as PAIR_COLUMNS
from macpo.data.pair_layouts import SIDES
from macpo.data.preferences import load_preferences
from macpo.data.prompts import Repeats
from macpo.data.rows import EmptyText, Row, Source, in_words
from macpo.data.spool import Records, Spool, whole
from macpo.engine.data.messages import Message, parts_of
from macpo.engine.data.records import Example
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
        for pair in pairs:
            spool.add(pair.example(format))
        return whole(spool), counts
    check_read(source.columns, format, _READS[format])
    found = Counter(rows=0)
    for row in rows:
        found["rows"] += 1
        try:
            before, response = FORMATS[format](row)
            prompt = prompt_before_response(row, before)
        except EmptyText:
            if empty != "drop":
                raise
            found["empty_dropped"] += 1
            continue
        example = Example(prompt, response["content"], parts=parts_of(response))
        spool.add(example)
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
        name, number = Path(path).name, found["rows"]
        log.warning("%s: %d examples of %d rows; %s", name, len(examples), number, in_words(noted))
    return examples, dict(found)


def _detect(row: Row) -> str:
    has = {name for name, value in row.fields.items() if value is not None} or row.fields.keys()
    if {"chosen", "rejected"} <= has or {"response_0", "response_1"} <= has:
        return "chosen"
    if "instruction" in has and isinstance(row.fields.get("output"), list):
        return "chosen"
    has |= {"response", "completion"} & row.fields.keys()  # null there is an empty response
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


def _messages(row: Row) -> tuple[list[Message], Message]:
    if not isinstance(row.fields.get("messages"), list):
        row.fail("messages", "not a list of chat messages")
    return last_message(row, "messages", messages_of(row, "messages"))


def _response(row: Row) -> tuple[list[Message], Message]:
    field = next((name for name in ("response", "completion") if row.fields.get(name) is not None), None)
    field = field or ("response" if "response" in row.fields else "completion")
    if not isinstance(row.fields.get(field), list | dict):
        return prompt_of(row), response_of(row, field)
    between, response = last_message(row, field, messages_of(row, field))
    return prompt_of(row) + between, response


def _alpaca(row: Row) -> tuple[list[Message], Message]:
    return alpaca_prompt(row), response_of(row, "output")


def _sharegpt(row: Row) -> tuple[list[Message], Message]:
    return last_message(row, "conversations", sharegpt_messages(row))


FORMATS: dict[str, Callable[[Row], tuple[list[Message], Message]]] = {
    "messages": _messages,
    "response": _response,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_READS = {
    "messages": ("messages", "system", "tools"),
    "response": ("prompt", "response", "completion", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "history", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
}
COLUMNS = ["messages", "prompt", "response", "completion", "instruction", "input", "output", "system", "history"]
COLUMNS += ["conversations", "tools"]
