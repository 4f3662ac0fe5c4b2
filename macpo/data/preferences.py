"""Human preferences -> pairs, and three disjoint sets of their prompts.

    pairs, counts = load_preferences("hh-rlhf/harmless-base")
    sets = split(pairs, teacher=5000, student=5000, test=2000, seed=0)

Formats, told apart by the keys of the first row:

    hh      {"chosen", "rejected"}: dialogues "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic HH-RLHF)
    pku     {"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"} (PKU-SafeRLHF)
    pairs   {"prompt", "chosen", "rejected"}: text, or lists of chat messages (with or without the conversation)
    alpaca  {"instruction", "input", "output": [chosen, rejected]}, also with "system" and "history"
    sharegpt  {"conversations": [{"from", "value"}, …], "chosen": {"from", "value"}, "rejected"}, also with "system"

Prompts with a single response are in macpo/data/examples.py.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from macpo.data.columns import check_read
from macpo.data.prompts import Prompts, Repeats
from macpo.data.rows import EmptyText, Row, Source
from macpo.data.spool import Records, Spool, spooled, whole
from macpo.engine.data.chat import ROLES
from macpo.engine.data.records import Message, Pair, Prompt
from macpo.engine.errors import ConfigError, DataError

log = logging.getLogger("macpo.data")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LAST = "\n\nAssistant:"
_DROPPED = ("empty_dropped", "identical_dropped", "prompt_mismatch_dropped", "malformed_dropped")
_PUBLISHED_EMPTIES = ("hh", "pku")
SIDES = ("chosen", "rejected")
EMPTY_FIX = "remove the row, or set data.empty: drop"


class _Sides(NamedTuple):
    """One row in a common layout: the prompt in front of each response, and the two responses."""

    chosen_prompt: Sequence[Message]
    rejected_prompt: Sequence[Message]
    chosen: str
    rejected: str


def load_preferences(
    source: Source | str | Path,
    *,
    format: str = "auto",
    preference: str = "better",
    empty: str = "auto",
    contradictions: str = "keep",
) -> tuple[Records[Pair], dict[str, int]]:
    """Return the pairs in the order of the rows, and counts; the pairs are on disk if they are many.

    Args:
        source: which rows; a path alone reads its whole training split.
        format: layout of the rows; "auto" goes by the keys of the first row.
        preference: which PKU label decides, "better" or "safer".
        empty: a prompt or response of white space raises ("error") or drops the row ("drop"); "auto" drops in hh and
            pku, whose published files hold some.
        contradictions: pairs of one prompt that prefer the same two responses both ways stay ("keep") or all go
            ("drop").

    Counts: `rows`, `pairs`, `prompts` (distinct), `duplicate_rows`, `duplicate_prompts` (pairs beyond a prompt's
    first), `prefix_pairs` (one response begins with the other), and what was dropped: `identical_dropped`,
    `prompt_mismatch_dropped`, `malformed_dropped` (an HH dialogue without a last human turn), `empty_dropped`; where
    there are any, also `contradictory_pairs` or `contradictory_dropped`.
    Raises ConfigError for settings and paths, DataError with file, line and field for rows, or if no pair is left.
    """
    source = source if isinstance(source, Source) else Source(source)
    _check(format, source.columns, preference, empty, contradictions)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", *_DROPPED, "prefix_pairs"), 0))
    spool, repeats, layout = Spool(Pair), Repeats(), format
    for row in source.rows():
        counts["rows"] += 1
        if counts["rows"] == 1:
            layout = _detect(row) if format == "auto" else format
            check_read(source.columns, layout, _reads(layout, preference))
        try:
            sides = FORMATS[layout](row, preference)
        except EmptyText:
            if empty == "error" or (empty == "auto" and layout not in _PUBLISHED_EMPTIES):
                raise
            counts["empty_dropped"] += 1
            continue
        dropped = "malformed_dropped" if sides is None else _why_dropped(sides)
        if sides is None or dropped:
            counts[dropped] += 1
            continue
        counts["prefix_pairs"] += sides.chosen.startswith(sides.rejected) or sides.rejected.startswith(sides.chosen)
        if sides.chosen_prompt[-1]["role"] != "user":
            row.fail("prompt", "its last message is not the user's", "end the prompt with the user's message")
        pair = Pair(Prompt.of(with_system(row, sides.chosen_prompt)), sides.chosen, sides.rejected)
        spool.add(pair, row.file, row.line)
        repeats.add(pair)
    repeated, contradicted = repeats.found()
    pairs = whole(spool)
    if contradicted.any():
        what = "contradictory_pairs" if contradictions == "keep" else "contradictory_dropped"
        counts[what] = int(contradicted.sum())
        if contradictions == "drop":
            pairs, repeated = pairs.take(np.flatnonzero(~contradicted)), repeated[~contradicted]
    if not pairs:
        what = ", ".join(f"{name}={n}" for name, n in counts.items() if n) or "it has no rows"
        raise DataError(f"no preference pair is left ({what})", "check the file and data.format", file=str(source.path))
    counts["pairs"] = len(pairs)
    counts["prompts"] = len(np.unique(pairs.ids))
    counts["duplicate_prompts"] = len(pairs) - counts["prompts"]
    counts["duplicate_rows"] = int(repeated.sum())
    reported = (*_DROPPED, "duplicate_rows", "duplicate_prompts", "contradictory_pairs", "contradictory_dropped")
    noted = {name: counts[name] for name in reported if counts[name]}
    if noted:
        log.warning("%s: %d pairs of %d rows; %s", Path(source.path).name, len(pairs), counts["rows"], noted)
    return pairs, dict(counts)


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint sets of prompts; `teacher` and `rest` keep every pair of a prompt, the others keep its first."""

    teacher: Records[Pair]
    student: Records[Pair]
    test: Records[Pair]
    rest: Records[Pair]


def split(
    pairs: Sequence[Pair], *, teacher: int, student: int, test: int, seed: int, held_out: Records[Pair] | None = None
) -> Splits:
    """Draw this many distinct prompts into each set; the others go to `rest`.

    The draw orders prompts by a hash of seed and content, so it depends on neither the order of the rows nor other
    prompts, and a larger teacher or student set never changes the test set. Where pairs are `held_out`, the test set
    is drawn from these, and no other set has a prompt of it.
    Raises DataError, naming the numbers, if there are too few distinct prompts.
    """
    pairs = pairs if isinstance(pairs, Records) else spooled(pairs, Pair)
    start = test if held_out is None else 0
    tests = None if held_out is None else Prompts(held_out, seed).first(0, test)
    prompts = Prompts(pairs, seed, without=None if tests is None else tests.ids)
    wanted = start + student + teacher
    if len(prompts) < wanted or (tests is not None and len(tests) < test):
        found = f"{len(prompts)} distinct prompts (of {len(pairs)} pairs)"
        asked = f"teacher_prompts {teacher} + student_prompts {student} + test_prompts {test}"
        if tests is not None:
            found += f" to train on and {len(tests)} to evaluate on"
            wanted += test
        raise DataError(
            f"{found} are fewer than the {wanted} asked for: {asked}",
            "lower these numbers or add data",
            field="data",
        )
    middle, end = start + student, start + student + teacher
    return Splits(
        teacher=prompts.every(middle, end),
        student=prompts.first(start, middle),
        test=prompts.first(0, test) if tests is None else tests,
        rest=prompts.every(end),
    )


def _check(format: str, columns: Mapping[str, str], preference: str, empty: str, contradictions: str) -> None:
    known = ["auto", *FORMATS]
    for field, got, allowed in (
        ("data.format", format, known),
        ("data.preference", preference, ["better", "safer"]),
        ("data.empty", empty, ["auto", "error", "drop"]),
        ("data.contradictions", contradictions, ["keep", "drop"]),
        *(("data.columns", name, PAIR_COLUMNS) for name in columns),
    ):
        if got not in allowed:
            raise ConfigError(f"got {got!r}", f"use {', '.join(allowed)}", field=field)


def _detect(row: Row) -> str:
    has = {name for name, value in row.fields.items() if value is not None} or row.fields.keys()
    if {"response_0", "response_1"} <= has:
        return "pku"
    if "instruction" in has and ("output" in has or {"chosen", "rejected"} <= has):
        return "alpaca"
    if {"conversations", "chosen", "rejected"} <= has:
        return "sharegpt"
    if {"chosen", "rejected"} <= row.fields.keys():
        if _is_bare_hh(row):
            return "hh"
        if "prompt" in row.fields or not isinstance(row.fields["chosen"], str):
            return "pairs"
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in has] or ["prompt"]
    row.missing(
        missing[0], "missing, and the keys fit none of the formats hh, pku, pairs, alpaca, sharegpt", *missing[1:]
    )


def _is_bare_hh(row: Row) -> bool:
    """Whether a row has no prompt, and its responses are HH dialogues."""
    chosen = row.fields.get("chosen")
    return row.fields.get("prompt") is None and isinstance(chosen, str) and _LAST in chosen


def _why_dropped(sides: _Sides) -> str:
    """Return the name of the count that a dropped row goes to, "" for a row that is kept."""
    if not alike(sides.chosen_prompt, sides.rejected_prompt):
        return "prompt_mismatch_dropped"
    return "identical_dropped" if sides.chosen == sides.rejected else ""


def alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two dialogues are the same but for outer white space."""
    return one == other or (
        len(one) == len(other)
        and all(
            {**a, "content": a["content"].strip()} == {**b, "content": b["content"].strip()}
            for a, b in zip(one, other, strict=True)
        )
    )


def with_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """Return a dialogue that begins with the row's `system` text, if there is any and it does not so already."""
    if row.fields.get("system") is None or not (text := text_of(row, "system")).strip():
        return list(messages)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != text.strip():
            row.fail("system", "it is not the system message that the dialogue begins with", "keep one of the two")
        return list(messages)
    return [{"role": "system", "content": text}, *messages]


def text_of(row: Row, field: str) -> str:
    if field not in row.fields:
        row.fail(field, "the field is missing")
    return checked_text(row, field, row.fields[field])


def answer_of(row: Row, field: str, value: Any = None) -> str:
    """Return a response, the field's own unless a value is given. Raises EmptyText for one of white space."""
    text = text_of(row, field) if value is None else checked_text(row, field, value)
    if not text.strip():
        row.fail(field, "the answer is empty or white space", EMPTY_FIX, EmptyText)
    return text


def checked_text(row: Row, field: str, value: Any) -> str:
    """Return a text to the character. Raises EmptyText for null, DataError for anything else."""
    if value is None:
        row.fail(
            field, "null", f"correct the row, set data.empty: drop, or map the name: {row.mapping(field)}", EmptyText
        )
    if not isinstance(value, str):
        row.fail(field, f"not text but {type(value).__name__}: {value!r:.60}")
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        row.fail(field, f"lone surrogate U+{ord(value[error.start]):04X}", "remove or pair it")
    return value


def user_turn(row: Row, field: str, text: str) -> Message:
    if not text.strip():
        row.fail(field, "the prompt is empty or white space", EMPTY_FIX, EmptyText)
    return {"role": "user", "content": text}


def _hh(row: Row, preference: str) -> _Sides | None:
    sides = [_hh_dialogue(row, field) for field in SIDES]
    prompts = [_turns(prompt) for prompt, _ in sides]
    if any("\n\nHuman:" in answer for _, answer in sides):
        return None  # the dialogue ends with a human turn: it has no answer to compare
    if prompts[0] == prompts[1] and (not prompts[0] or prompts[0][-1]["role"] != "user"):
        return None
    # Outer white space is the layout's own separator.
    chosen, rejected = (answer_of(row, field, side[1].strip()) for field, side in zip(SIDES, sides, strict=True))
    return _Sides(prompts[0], prompts[1], chosen, rejected)


def _hh_dialogue(row: Row, field: str) -> tuple[str, str]:
    """Split a dialogue into prompt and response at the last assistant turn."""
    prompt, found, answer = f"\n\n{text_of(row, field).strip()}".rpartition(_LAST)
    if not found or not prompt.startswith("\n\nHuman:"):
        row.fail(field, f"no dialogue of Human and Assistant turns: {prompt[:50]!r}", "set data.format to pairs")
    return prompt, answer


def _turns(dialogue: str) -> list[Message]:
    """Parse "\\n\\nHuman: …\\n\\nAssistant: …" into chat messages; successive turns of one speaker are joined."""
    parts = _TURN.split(dialogue)[1:]
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content.strip()}"
        messages.append({"role": role, "content": content.strip()})
    return messages


def _pku(row: Row, preference: str) -> _Sides:
    label = f"{preference}_response_id"
    if label not in row.fields:
        row.fail(label, "the field is missing")
    better = row.fields[label]
    if row.untyped and better in ("0", "1"):
        better = int(better)
    if better not in (0, 1) or isinstance(better, bool):
        row.fail(label, f"must be 0 or 1, got {better!r:.40}")
    prompt = [user_turn(row, "prompt", text_of(row, "prompt"))]
    return _Sides(prompt, prompt, answer_of(row, f"response_{better}"), answer_of(row, f"response_{1 - better}"))


def _pairs(row: Row, preference: str) -> _Sides | None:
    if _is_bare_hh(row):
        return _hh(row, preference)
    before: list[list[Message]] = []
    answers: list[str] = []
    has_prompt = row.fields.get("prompt") is not None
    given = prompt_of(row) if has_prompt or not isinstance(row.fields.get("chosen"), list) else []
    separated = isinstance(row.fields.get("prompt"), str) and _is_hh(row.fields["prompt"])
    for field in SIDES:
        if not isinstance(row.fields.get(field), list):
            answer = answer_of(row, field)
            answers.append(answer.strip() if separated else answer)
            before.append(given)
            continue
        *conversation, last = messages_of(row, field)
        if last["role"] != "assistant":
            row.fail(field, f"the last message is from {last['role']!r}, not the assistant", "end with the answer")
        # A list may hold the answer alone, or the conversation too, with more or less of it in `prompt`.
        short, long = sorted((given, conversation), key=len)
        if not (alike(short, long[: len(short)]) or alike(short, long[len(long) - len(short) :])):
            row.fail(field, "its conversation is not the row's prompt", "give the same prompt in both")
        answers.append(answer_of(row, field, last["content"]))
        before.append(long)
    if not all(before):
        row.fail("prompt", "the field is missing and the answers hold no conversation")
    return _Sides(before[0], before[1], answers[0], answers[1])


def prompt_of(row: Row) -> list[Message]:
    """Parse the prompt: a user's text, an HH dialogue that ends before its response, or chat messages."""
    if isinstance(row.fields.get("prompt"), list):
        return messages_of(row, "prompt")
    text = text_of(row, "prompt")
    if _is_hh(text):
        return _turns(f"\n\n{text.strip().removesuffix(_LAST)}")
    return [user_turn(row, "prompt", text)]


def _is_hh(text: str) -> bool:
    """Whether a prompt is an HH dialogue that ends before its response."""
    return text.lstrip()[:6] == "Human:" and text.rstrip().endswith(_LAST)


def messages_of(row: Row, field: str) -> list[Message]:
    messages: list[Message] = []
    for message in row.fields[field]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            fix = "each message is {role: system, user or assistant, content: text}"
            row.fail(field, f"not a chat message: {message!r:.60}", fix)
        messages.append({"role": message["role"], "content": checked_text(row, field, message.get("content"))})
    if not messages:
        row.fail(field, "an empty list of messages", "give at least one message, or set data.empty: drop", EmptyText)
    return messages


def _alpaca(row: Row, preference: str) -> _Sides:
    answers = row.fields.get("output") if "output" in row.fields else [row.fields["chosen"], row.fields["rejected"]]
    if not isinstance(answers, list) or len(answers) < 2:
        row.fail("output", "must be a list: [chosen, rejected]")
    messages = alpaca_prompt(row)
    chosen, rejected = (answer_of(row, "output", checked_text(row, "output", answer)) for answer in answers[:2])
    return _Sides(messages, messages, chosen, rejected)


def alpaca_prompt(row: Row) -> list[Message]:
    """Build the messages: earlier rounds, then instruction and input as the user's message."""
    messages: list[Message] = []
    for turn in row.fields.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            row.fail("history", f"must be a list of [question, answer], got {turn!r:.40}")
        messages.append(user_turn(row, "history", checked_text(row, "history", turn[0])))
        messages.append({"role": "assistant", "content": checked_text(row, "history", turn[1])})
    parts = [text_of(row, "instruction"), text_of(row, "input") if row.fields.get("input") else ""]
    messages.append(user_turn(row, "instruction", "\n".join(filter(None, parts))))
    return messages


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def sharegpt_messages(row: Row) -> list[Message]:
    """Return the chat messages of `conversations`."""
    turns = row.fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", "not a list of messages", 'write [{"from": "human", "value": "…"}, …]')
    return [_sharegpt_message(row, "conversations", turn) for turn in turns]


def _sharegpt_message(row: Row, field: str, turn: Any) -> Message:
    if not isinstance(turn, dict) or turn.get("from") not in _SPEAKERS:
        row.fail(field, f"not a message: {turn!r:.60}", f"each is {{from: {' or '.join(_SPEAKERS)}, value: text}}")
    return {"role": _SPEAKERS[turn["from"]], "content": checked_text(row, field, turn.get("value"))}


def _sharegpt(row: Row, preference: str) -> _Sides:
    messages = sharegpt_messages(row)
    answers = []
    for field in SIDES:
        answer = _sharegpt_message(row, field, row.fields.get(field))
        if answer["role"] != "assistant":
            row.fail(field, f"the answer is from {answer['role']!r}, not the assistant", "give the assistant's message")
        answers.append(answer_of(row, field, answer["content"]))
    return _Sides(messages, messages, answers[0], answers[1])


FORMATS: dict[str, Callable[[Row, str], _Sides | None]] = {
    "hh": _hh,
    "pku": _pku,
    "pairs": _pairs,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_READS = {
    "hh": ("chosen", "rejected", "system"),
    "pku": ("prompt", "response_0", "response_1", "system"),
    "pairs": ("prompt", "chosen", "rejected", "system"),
    "alpaca": ("instruction", "input", "output", "chosen", "rejected", "system", "history"),
    "sharegpt": ("conversations", "chosen", "rejected", "system"),
}
PAIR_COLUMNS = ["prompt", "chosen", "rejected", "response_0", "response_1", "better_response_id", "safer_response_id"]
PAIR_COLUMNS += ["instruction", "input", "output", "system", "history", "conversations"]


def _reads(layout: str, preference: str) -> tuple[str, ...]:
    """Return the columns that rows in a layout have."""
    return (*_READS[layout], *([f"{preference}_response_id"] if layout == "pku" else []))
