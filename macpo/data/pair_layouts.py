"""Layouts of preference rows, told apart by the keys of the first row.

    hh      {"chosen", "rejected"}: dialogues "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic HH-RLHF)
    pku     {"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"} (PKU-SafeRLHF)
    pairs   {"prompt", "chosen", "rejected"}: text, or lists of chat messages (with or without the conversation)
    alpaca  {"instruction", "input", "output": [chosen, rejected]}, also with "history"
    sharegpt  {"conversations": [{"from", "value"}, …], "chosen": {"from", "value"}, "rejected"}

Each also with "system", the text of a system message, and "tools", the functions that the dialogue may call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from macpo.data.dialogues import (
    LAST,
    alike,
    alpaca_prompt,
    checked_text,
    is_hh,
    last_message,
    messages_of,
    prompt_of,
    response_of,
    said,
    sharegpt_message,
    sharegpt_messages,
    text_of,
    turns,
    user_turn,
)
from macpo.data.rows import Row
from macpo.engine.data.messages import Message, parts_of
from macpo.engine.errors import shown

SIDES = ("chosen", "rejected")


class Sides(NamedTuple):
    """One row in a common layout: the prompt in front of each response, and the two responses."""

    chosen_prompt: Sequence[Message]
    rejected_prompt: Sequence[Message]
    chosen: Message
    rejected: Message

    @property
    def why_dropped(self) -> str:
        """The name of the count that the row goes to if it is no pair, "" for one that is kept."""
        if not alike(self.chosen_prompt, self.rejected_prompt):
            return "prompt_mismatch_dropped"
        texts_agree = self.chosen["content"].strip() == self.rejected["content"].strip()  # white space is no preference
        return "identical_dropped" if texts_agree and parts_of(self.chosen) == parts_of(self.rejected) else ""

    @property
    def has_prefix(self) -> bool:
        """Whether the text of one response begins with the other's."""
        chosen, rejected = self.chosen["content"], self.rejected["content"]
        return bool(chosen.startswith(rejected) or rejected.startswith(chosen))


def detect(row: Row) -> str:
    """Return the layout of a row. Raises DataError with the setting that maps likely columns if it fits none."""
    has = {name for name, value in row.fields.items() if value is not None} or row.fields.keys()
    if {"response_0", "response_1"} <= has:
        return "pku"
    if "instruction" in has and ("output" in has or {"chosen", "rejected"} <= has):
        return "alpaca"
    if {"conversations", "chosen", "rejected"} <= has:
        return "sharegpt"
    if {"chosen", "rejected"} <= row.fields.keys():
        if _is_bare_hh(row):
            return "pairs" if "prompt" in row.fields else "hh"  # where there are prompts, some rows may lack theirs
        if row.fields.keys() & {"prompt", "messages"} or not isinstance(row.fields["chosen"], str):
            return "pairs"
    missing = [name for name in ("prompt", *SIDES) if name not in has] or ["prompt"]
    problem = "missing, and the keys fit none of the formats hh, pku, pairs, alpaca, sharegpt"
    row.missing(missing[0], problem, *missing[1:])


def _is_bare_hh(row: Row) -> bool:
    """Whether a row has no prompt, and its responses are HH dialogues."""
    chosen = row.fields.get("chosen")
    has_prompt = row.fields.get("prompt") is not None or row.fields.get("messages") is not None
    return not has_prompt and isinstance(chosen, str) and LAST in chosen


def _hh(row: Row, preference: str) -> Sides | None:
    sides = [_hh_dialogue(row, field) for field in SIDES]
    prompts = [turns(prompt) for prompt, _ in sides]
    if any("\n\nHuman:" in response for _, response in sides):
        return None  # the dialogue ends with a human turn: it has no response to compare
    if prompts[0] == prompts[1] and (not prompts[0] or prompts[0][-1]["role"] != "user"):
        return None
    chosen, rejected = (response_of(row, field, said(side[1])) for field, side in zip(SIDES, sides, strict=True))
    return Sides(prompts[0], prompts[1], chosen, rejected)


def _hh_dialogue(row: Row, field: str) -> tuple[str, str]:
    """Split a dialogue into prompt and response at the last assistant turn."""
    prompt, found, response = f"\n\n{text_of(row, field).lstrip()}".rpartition(LAST)
    if not found or not prompt.startswith("\n\nHuman:"):
        row.fail(field, f"no dialogue of Human and Assistant turns: {shown(prompt, 50)}", "set data.format to pairs")
    return prompt, response


def _pku(row: Row, preference: str) -> Sides:
    label = f"{preference}_response_id"
    if label not in row.fields:
        row.fail(label, "the field is missing")
    better = row.fields[label]
    if row.untyped and better in ("0", "1"):
        better = int(better)
    if better not in (0, 1) or isinstance(better, bool):
        row.fail(label, f"must be 0 or 1, got {shown(better, 40)}")
    prompt = [user_turn(row, "prompt", text_of(row, "prompt"))]
    return Sides(prompt, prompt, response_of(row, f"response_{better}"), response_of(row, f"response_{1 - better}"))


def _pairs(row: Row, preference: str) -> Sides | None:
    if _is_bare_hh(row):
        return _hh(row, preference)
    before: list[list[Message]] = []
    responses: list[Message] = []
    has_prompt = row.fields.get("prompt") is not None or row.fields.get("messages") is not None
    given = prompt_of(row) if has_prompt or not isinstance(row.fields.get("chosen"), list) else []
    for field in SIDES:
        value = row.fields.get(field)
        if not isinstance(value, list) and not (isinstance(value, dict) and "role" in value):
            text = text_of(row, field)
            responses.append(response_of(row, field, said(text) if is_hh(row.fields.get("prompt")) else text))
            before.append(given)
            continue
        conversation, response = last_message(row, field, messages_of(row, field))
        # A list may hold the response alone, or the conversation too, with more or less of it in `prompt`.
        short, long = sorted((given, conversation), key=len)
        if not (alike(short, long[: len(short)]) or alike(short, long[len(long) - len(short) :])):
            row.fail(field, "its conversation is not the row's prompt", "give the same prompt in both")
        responses.append(response)
        before.append(long)
    if not all(before):
        row.fail("prompt", "the field is missing and the responses hold no conversation")
    if not alike(*before):
        same = itertools.takewhile(lambda each: alike(each[:1], each[1:]), zip(*before, strict=False))
        problem = f"its dialogue parts from chosen's at message {len(list(same)) + 1}, before the last response"
        fix = "give both the same dialogue up to their last responses, or end both where they part"
        row.fail("rejected", problem, fix)
    return Sides(before[0], before[1], responses[0], responses[1])


def _alpaca(row: Row, preference: str) -> Sides:
    responses = row.fields["output"] if "output" in row.fields else [text_of(row, side) for side in SIDES]
    if not isinstance(responses, list) or len(responses) < 2:
        row.fail("output", "must be a list: [chosen, rejected]")
    messages = alpaca_prompt(row)
    chosen, rejected = (response_of(row, "output", checked_text(row, "output", response)) for response in responses[:2])
    return Sides(messages, messages, chosen, rejected)


def _sharegpt(row: Row, preference: str) -> Sides:
    messages, responses = sharegpt_messages(row), []
    for field in SIDES:
        response = sharegpt_message(row, field, row.fields.get(field))
        if response["role"] != "assistant":
            row.fail(
                field, f"the response is from {response['role']!r}, not the assistant", "give the assistant's message"
            )
        responses.append(response_of(row, field, response))
    return Sides(messages, messages, responses[0], responses[1])


FORMATS: dict[str, Callable[[Row, str], Sides | None]] = {
    "hh": _hh,
    "pku": _pku,
    "pairs": _pairs,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_READS = {
    "hh": ("chosen", "rejected"),
    "pku": ("prompt", "response_0", "response_1"),
    "pairs": ("prompt", "messages", "chosen", "rejected"),
    "alpaca": ("instruction", "input", "output", "chosen", "rejected", "history"),
    "sharegpt": ("conversations", "chosen", "rejected"),
}
COLUMNS = ["prompt", "chosen", "rejected", "response_0", "response_1", "better_response_id", "safer_response_id"]
COLUMNS += ["instruction", "input", "output", "system", "history", "conversations", "messages", "tools"]


def reads(layout: str, preference: str) -> tuple[str, ...]:
    """Return the columns that rows in a layout have."""
    return (*_READS[layout], *([f"{preference}_response_id"] if layout == "pku" else []), "system", "tools")
