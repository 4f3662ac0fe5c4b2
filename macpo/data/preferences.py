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

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from macpo.data.rows import Row, Source
from macpo.engine.data.messages import Message, message_of, parts_of, tools_of, with_tools
from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.errors import ConfigError, DataError

log = logging.getLogger("macpo.data")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LAST = "\n\nAssistant:"
_DROPPED = ("empty_dropped", "identical_dropped", "prompt_mismatch_dropped", "malformed_dropped")


R = TypeVar("R", Pair, Example)
T = TypeVar("T")


class _Sides(NamedTuple):
    """One row in a common layout: the prompt in front of each response, and the two responses."""

    chosen_prompt: Sequence[Message]
    rejected_prompt: Sequence[Message]
    chosen: str
    rejected: str
    chosen_parts: Message | None = None
    rejected_parts: Message | None = None


def load_preferences(
    source: Source | str | Path, *, format: str = "auto", preference: str = "better", empty: str = "auto"
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs in the order of the rows, and counts.

    Args:
        source: which rows; a path alone reads its whole training split.
        preference: which PKU label decides, "better" or "safer".
        empty: a response of white space raises ("error") or drops the row ("drop"); "auto" drops in hh and pku, whose
            published files hold some.

    Counts: `rows`, `pairs`, `prompts` (distinct), `duplicate_rows`, `duplicate_prompts` (pairs beyond a prompt's
    first), `prefix_pairs` (one response begins with the other), and what was dropped: `identical_dropped`,
    `prompt_mismatch_dropped`, `malformed_dropped` (an HH dialogue without a last human turn), `empty_dropped`.
    Raises ConfigError for settings and paths, DataError with file, line and field for rows, or if no pair is left.
    """
    source = source if isinstance(source, Source) else Source(source)
    path = source.path
    _check(format, source.columns, preference, empty)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", *_DROPPED, "prefix_pairs"), 0))
    pairs: list[Pair] = []
    for row in source.rows():
        counts["rows"] += 1
        if format == "auto":
            format = _detect(row)
        sides = FORMATS[format](row, preference)
        dropped = "malformed_dropped" if sides is None else _why_dropped(row, sides, empty, format)
        if sides is None or dropped:
            counts[dropped] += 1
            continue
        counts["prefix_pairs"] += sides.chosen.startswith(sides.rejected) or sides.rejected.startswith(sides.chosen)
        prompt = prompt_before_answer(row, sides.chosen_prompt)
        pair = Pair(prompt, sides.chosen, sides.rejected)
        pairs.append(replace(pair, chosen_parts=sides.chosen_parts, rejected_parts=sides.rejected_parts))
    if not pairs:
        what = ", ".join(f"{name}={n}" for name, n in counts.items() if n) or "it has no rows"
        raise DataError(f"no preference pair is left ({what})", "check the file and data.format", file=str(path))
    prompts = Counter(pair.prompt.id for pair in pairs)
    counts["pairs"] = len(pairs)
    counts["prompts"] = len(prompts)
    counts["duplicate_prompts"] = len(pairs) - len(prompts)
    counts["duplicate_rows"] = len(pairs) - len({(p.prompt.id, p.chosen, p.rejected) for p in pairs})
    noted = {name: counts[name] for name in (*_DROPPED, "duplicate_rows", "duplicate_prompts") if counts[name]}
    if noted:
        log.warning("%s: %d pairs of %d rows; %s", Path(path).name, len(pairs), counts["rows"], noted)
    return pairs, dict(counts)


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint sets of prompts; `teacher` and `rest` keep every pair of a prompt, the others keep its first."""

    teacher: list[Pair]
    student: list[Pair]
    test: list[Pair]
    rest: list[Pair]


def split(pairs: Sequence[Pair], *, teacher: int, student: int, test: int, seed: int) -> Splits:
    """Draw this many distinct prompts into each set; the others go to `rest`.

    The draw orders prompts by a hash of seed and content, so it depends on neither the order of the rows nor other
    prompts, and a larger teacher or student set never changes the test set.
    Raises DataError, naming the numbers, if there are too few distinct prompts.
    """
    by_prompt = {group[0].prompt.id: group for group in shuffled_prompts(pairs, seed)}
    wanted = test + student + teacher
    if len(by_prompt) < wanted:
        raise DataError(
            f"{len(by_prompt)} distinct prompts (of {len(pairs)} pairs) are fewer than the {wanted} asked for: "
            f"teacher_prompts {teacher} + student_prompts {student} + test_prompts {test}",
            "lower these numbers or add data",
            field="data",
        )
    order = iter(by_prompt)
    first = {
        name: [by_prompt[p][0] for p in itertools.islice(order, n)] for name, n in (("test", test), ("s", student))
    }
    whole = [pair for p in itertools.islice(order, teacher) for pair in by_prompt[p]]
    return Splits(whole, first["s"], first["test"], [pair for p in order for pair in by_prompt[p]])


def shuffled_prompts(records: Iterable[R], seed: int) -> list[list[R]]:
    """Return the records of each distinct prompt, prompts ordered by a hash of seed and prompt."""
    by_prompt: dict[str, list[R]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt.id, []).append(record)
    order = sorted(by_prompt, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    return [by_prompt[prompt] for prompt in order]


def _check(format: str, columns: Mapping[str, str], preference: str, empty: str) -> None:
    known = ["auto", *FORMATS]
    for field, got, allowed in (
        ("data.format", format, known),
        ("data.preference", preference, ["better", "safer"]),
        ("data.empty", empty, ["auto", "error", "drop"]),
        *(("data.columns", name, PAIR_COLUMNS) for name in columns),
    ):
        if got not in allowed:
            raise ConfigError(f"got {got!r}", f"use {', '.join(allowed)}", field=field)


def _detect(row: Row) -> str:
    has = row.fields.keys()
    if {"response_0", "response_1"} <= has:
        return "pku"
    if "instruction" in has and ("output" in has or {"chosen", "rejected"} <= has):
        return "alpaca"
    if {"conversations", "chosen", "rejected"} <= has:
        return "sharegpt"
    if {"chosen", "rejected"} <= has:
        bare = "prompt" not in has and isinstance(row.fields["chosen"], str)
        if not bare or _LAST in row.fields["chosen"]:
            return "hh" if bare else "pairs"
    missing = next((name for name in ("prompt", "chosen", "rejected") if name not in has), "prompt")
    row.fail(missing, "missing, and the keys fit none of the formats hh, pku, pairs, alpaca, sharegpt")


def _why_dropped(row: Row, sides: _Sides, empty: str, format: str) -> str:
    """Return the name of the count that a dropped row goes to, "" for a row that is kept."""
    for name, answer in (("chosen", sides.chosen), ("rejected", sides.rejected)):
        if not answer.strip() and getattr(sides, f"{name}_parts") is None:
            if empty == "error" or (empty == "auto" and format not in ("hh", "pku")):
                row.fail(name, "the answer is empty or white space", "remove the row")
            return "empty_dropped"
    if list(sides.chosen_prompt) != list(sides.rejected_prompt):
        return "prompt_mismatch_dropped"
    texts_agree = sides.chosen.strip() == sides.rejected.strip()  # outer white space alone is no preference
    same = texts_agree and sides.chosen_parts == sides.rejected_parts
    return "identical_dropped" if same else ""


def prompt_before_answer(row: Row, messages: Sequence[Message]) -> Prompt:
    """The prompt of a row, with its `tools`; raise where an answer cannot follow it."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        problem = (
            "its last message is not the user's"
            if messages
            else "what precedes the answer does not end with the user's message"
        )
        fix = "end the prompt with the user's message; an answer that was begun belongs into the answers"
        row.fail("prompt", problem, fix)
    if not any(message["content"].strip() for message in messages if message["role"] == "user"):
        row.fail("prompt", "the prompt is empty or white space", "remove the row")
    tools = _part(row, "tools", tools_of, row.fields.get("tools"))
    return Prompt.of(with_tools(messages, tools), origin=(row.file, row.line))


def text_of(row: Row, field: str) -> str:
    if field not in row.fields:
        row.fail(field, "the field is missing")
    return checked_text(row, field, row.fields[field])


def checked_text(row: Row, field: str, value: Any) -> str:
    """Return a text to the character; raise for anything else."""
    if not isinstance(value, str):
        row.fail(field, "null" if value is None else f"not text but {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        row.fail(field, f"lone surrogate U+{ord(value[error.start]):04X}", "remove or pair it")
    return value


def user_turn(row: Row, field: str, text: str) -> Message:
    if not text.strip():
        row.fail(field, "the prompt is empty or white space", "remove the row")
    return {"role": "user", "content": text}


def _hh(row: Row, preference: str) -> _Sides | None:
    sides = [_hh_dialogue(row, field) for field in ("chosen", "rejected")]
    prompts = [_turns(prompt) for prompt, _ in sides]
    if any("\n\nHuman:" in answer for _, answer in sides):
        return None  # the dialogue ends with a human turn: it has no answer to compare
    if prompts[0] == prompts[1] and (not prompts[0] or prompts[0][-1]["role"] != "user"):
        return None
    return _Sides(prompts[0], prompts[1], _said(sides[0][1]), _said(sides[1][1]))


def _hh_dialogue(row: Row, field: str) -> tuple[str, str]:
    """Split a dialogue into prompt and response at the last assistant turn."""
    prompt, found, answer = f"\n\n{text_of(row, field).lstrip()}".rpartition(_LAST)
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
            content = f"{messages.pop()['content']}\n\n{_said(content)}"
        messages.append({"role": role, "content": _said(content)})
    return messages


def _said(text: str) -> str:
    """What a speaker said after "Human:" or "Assistant:", without the blank that the layout writes before it."""
    return text.removeprefix(" ")


def _pku(row: Row, preference: str) -> _Sides:
    label = f"{preference}_response_id"
    if label not in row.fields:
        row.fail(label, "the field is missing")
    better = row.fields[label]
    if better not in (0, 1) or isinstance(better, bool):
        row.fail(label, f"must be 0 or 1, got {better!r:.40}")
    prompt = [user_turn(row, "prompt", text_of(row, "prompt"))]
    return _Sides(prompt, prompt, text_of(row, f"response_{better}"), text_of(row, f"response_{1 - better}"))


def _pairs(row: Row, preference: str) -> _Sides:
    before: list[list[Message]] = []
    answers: list[Message] = []
    dialogues = isinstance(row.fields.get("chosen"), list)
    given = prompt_of(row) if "prompt" in row.fields or "messages" in row.fields or not dialogues else []
    for field in ("chosen", "rejected"):
        value = row.fields.get(field)
        if not isinstance(value, list) and not (isinstance(value, dict) and "role" in value):
            text = text_of(row, field)
            answers.append({"role": "assistant", "content": _said(text) if _is_hh(row.fields.get("prompt")) else text})
            before.append(given)
            continue
        conversation, answer = last_message(row, field, messages_of(row, field))
        # A list may hold the answer alone, or the conversation too, with more or less of it in `prompt`.
        short, long = sorted((given, conversation), key=len)
        if short not in (long[: len(short)], long[len(long) - len(short) :]):
            row.fail(field, "its conversation is not the row's prompt", "give the same prompt in both")
        answers.append(answer)
        before.append(long)
    if not all(before):
        row.fail("prompt", "the field is missing and the answers hold no conversation")
    if before[0] != before[1]:
        same = itertools.takewhile(lambda each: each[0] == each[1], zip(*before, strict=False))
        problem = f"its dialogue parts from chosen's at message {len(list(same)) + 1}, before the last answer"
        row.fail(
            "rejected", problem, "give both the same dialogue up to their last answers, or end both where they part"
        )
    chosen, rejected = answers
    texts = chosen["content"], rejected["content"]
    return _Sides(before[0], before[1], *texts, parts_of(chosen), parts_of(rejected))


def last_message(row: Row, field: str, messages: list[Message]) -> tuple[list[Message], Message]:
    """What precedes the answer, and the answer."""
    *before, answer = messages
    if answer["role"] != "assistant":
        row.fail(field, f"the last message is from {answer['role']!r}, not the assistant", "end with the answer")
    return before, answer


def prompt_of(row: Row) -> list[Message]:
    """Parse the prompt: a user's text, an HH dialogue that ends before its response, or chat messages."""
    field = "messages" if row.fields.get("prompt") is None and "messages" in row.fields else "prompt"
    if isinstance(row.fields.get(field), list | dict):
        return messages_of(row, field)
    text = text_of(row, "prompt")
    if _is_hh(text):
        return _turns(f"\n\n{text.strip().removesuffix(_LAST)}")
    return [user_turn(row, "prompt", text)]


def _is_hh(prompt: Any) -> bool:
    """Whether a prompt is a dialogue of HH-RLHF that ends before its response."""
    return isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(_LAST)


def messages_of(row: Row, field: str) -> list[Message]:
    """Parse a list of chat messages, or a single one, with all their parts."""
    given = row.fields[field]
    messages = [_part(row, field, message_of, each) for each in (given if isinstance(given, list) else [given])]
    if not messages:
        row.fail(field, "an empty list of messages", "give at least one message")
    return messages


def _part(row: Row, field: str, parse: Callable[[Any], T], value: Any) -> T:
    """Parse a part of a row; an error names the row."""
    try:
        return parse(value)
    except DataError as error:
        found = error.problems[0]
        row.fail(field, found.message, found.fix)


def _alpaca(row: Row, preference: str) -> _Sides:
    answers = row.fields.get("output") if "output" in row.fields else [row.fields["chosen"], row.fields["rejected"]]
    if not isinstance(answers, list) or len(answers) < 2:
        row.fail("output", "must be a list: [chosen, rejected]")
    chosen, rejected = (checked_text(row, "output", answer) for answer in answers[:2])
    messages = alpaca_prompt(row)
    return _Sides(messages, messages, chosen, rejected)


def alpaca_prompt(row: Row) -> list[Message]:
    """Build the messages: system text, earlier rounds, then instruction and input as the user's message."""
    messages: list[Message] = []
    if row.fields.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system")})
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
    """Return the chat messages of `conversations`; the row's system text goes first."""
    messages: list[Message] = []
    if row.fields.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system")})
    turns = row.fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", "not a list of messages", 'write [{"from": "human", "value": "…"}, …]')
    return [*messages, *(_sharegpt_message(row, "conversations", turn) for turn in turns)]


def _sharegpt_message(row: Row, field: str, turn: Any) -> Message:
    if not isinstance(turn, dict) or turn.get("from") not in _SPEAKERS:
        row.fail(field, f"not a message: {turn!r:.60}", f"each is {{from: {' or '.join(_SPEAKERS)}, value: text}}")
    return {"role": _SPEAKERS[turn["from"]], "content": checked_text(row, field, turn.get("value"))}


def _sharegpt(row: Row, preference: str) -> _Sides:
    messages = sharegpt_messages(row)
    answers = [_sharegpt_message(row, field, row.fields.get(field)) for field in ("chosen", "rejected")]
    for field, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer["role"] != "assistant":
            row.fail(field, f"the answer is from {answer['role']!r}, not the assistant", "give the assistant's message")
    return _Sides(messages, messages, answers[0]["content"], answers[1]["content"])


FORMATS: dict[str, Callable[[Row, str], _Sides | None]] = {
    "hh": _hh,
    "pku": _pku,
    "pairs": _pairs,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
PAIR_COLUMNS = ["prompt", "chosen", "rejected", "response_0", "response_1", "better_response_id", "safer_response_id"]
PAIR_COLUMNS += ["instruction", "input", "output", "system", "history", "conversations"]
