"""Prompt, Response, Example, Pair: the JSONL contract between stages.

Agents exchange text, never token ids, because every agent has its own tokenizer and template.
`finished` says that a response ended by itself; only then does it have EOS in log-probs and training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

from macpo.engine.data.messages import Message
from macpo.engine.errors import DataError, one_line
from macpo.engine.files import read_jsonl, write_jsonl

_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)  # made once: `json.dumps` would make one a call
_quoted = json.encoder.encode_basestring


def messages_text(messages: Sequence[Message]) -> str:
    """The messages as JSON with sorted keys, as `json.dumps` writes it; the commonest ones in a fifth of the time."""
    texts = []
    for message in messages:
        role, content = message["role"], message["content"]
        if len(message) > 2 or type(role) is not str or type(content) is not str:
            return _ENCODER.encode(messages)
        texts.append(f'{{"content": {_quoted(content)}, "role": {_quoted(role)}}}')
    return f"[{', '.join(texts)}]"


def prompt_id(messages: Sequence[Message]) -> str:
    """The id of a prompt of these messages: 16 hexadecimal digits, a hash of their content."""
    return hashlib.sha256(messages_text(messages).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that ends before the assistant's response; `id` is the hash of its content.

    `origin` is the (file, line) of the data that it was read from, for messages about it. Records on disk keep the
    line alone, because where the data lie changes nothing.
    """

    id: str
    messages: tuple[Message, ...]
    origin: tuple[str, int] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, messages: str | Iterable[Message], origin: tuple[str, int] | None = None) -> Self:
        """A prompt from chat messages with all their parts, or from a string that becomes one user turn."""
        turns: Iterable[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        kept = tuple(map(dict, turns))
        return cls(prompt_id(kept), kept, origin)

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt_id": self.id, "prompt": list(self.messages)}
        return row if self.origin is None else {**row, "line": self.origin[1]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        origin = ("", row["line"]) if "line" in row else None
        return cls(row["prompt_id"], tuple(row["prompt"]), origin)


def named(error: DataError, prompt: Prompt) -> DataError:
    """The same error, of a row: with its file and line, as far as they are known, and its prompt."""
    file, line = prompt.origin or ("", None)
    place = f"line {line} of the data, " if line and not file else ""
    said = one_line(prompt.messages[-1]["content"], 60) if prompt.messages else ""
    about = f" ({place}prompt {prompt.id}: {said!r})"
    problems = [replace(p, message=p.message.rstrip(".") + about, file=file, line=line) for p in error.problems]
    return type(error)(problems=problems)


@dataclass(frozen=True, slots=True)
class Response:
    """One policy's response to one prompt.

    `sum_logp` is its log-prob (nats) under that policy at generation, including the token that ended it. `ids_digest`
    identifies its token ids, so that the policy need not score the same ids again.
    """

    prompt_id: str
    agent: str
    text: str
    finished: bool
    num_tokens: int
    attempt: int = 0
    sum_logp: float | None = None
    ids_digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(**{name: row[name] for name in cls.__slots__ if name in row})


def ids_digest(ids: Iterable[int]) -> str:
    """Hash of a response's token ids, including the token that ended it."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with one response to imitate; `by` names its author ("human" or an agent).

    `parts` is the whole message of a response that holds more than its text, such as tool calls.
    """

    prompt: Prompt
    response: str
    finished: bool = True
    by: str = "human"
    parts: Message | None = None

    @property
    def reply(self) -> str | Message:
        """The response as the template gets it."""
        return self.parts or self.response

    def to_json(self) -> dict[str, Any]:
        row = {**self.prompt.to_json(), "answer": self.response, "finished": self.finished, "by": self.by}
        return row if self.parts is None else {**row, "parts": self.parts}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(Prompt.from_json(row), row["answer"], row["finished"], row["by"], row.get("parts"))


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a better and a worse response.

    `ref_chosen_logp` is the summed log-prob of `chosen` under the policy that is about to be trained,
    if a scoring stage has already computed it. `chosen_parts` and `rejected_parts` are the whole messages of responses
    that hold more than their text, such as tool calls. `margin` is by how much the better one is better, where the data
    say so.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_finished: bool = True
    rejected_finished: bool = True
    chosen_by: str = "human"
    rejected_by: str = "human"
    ref_chosen_logp: float | None = None
    chosen_parts: Message | None = None
    rejected_parts: Message | None = None
    margin: float | None = None

    def reply(self, side: str) -> str | Message:
        """The response of a side, "chosen" or "rejected", as the template gets it."""
        found: str | Message = getattr(self, f"{side}_parts") or getattr(self, side)
        return found

    def finished(self, side: str) -> bool:
        """Whether the response of a side, "chosen" or "rejected", ended by itself."""
        return bool(getattr(self, f"{side}_finished"))

    def example(self, side: str) -> Example:
        """The prompt with the response of one side."""
        finished, parts = getattr(self, f"{side}_finished"), getattr(self, f"{side}_parts")
        return Example(self.prompt, getattr(self, side), finished, parts=parts)

    def to_json(self) -> dict[str, Any]:
        row = self.prompt.to_json()
        for name in _PLAIN:
            row[name] = getattr(self, name)
        if self.chosen_parts is not None or self.rejected_parts is not None or self.margin is not None:
            row |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        rest = {
            name: row[name] for name in cls.__slots__ if name != "prompt" and (name in row or name not in _OPTIONAL)
        }
        return cls(Prompt.from_json(row), **rest)


_OPTIONAL = ("chosen_parts", "rejected_parts", "margin")  # absent where the response is its text, without a margin
_PLAIN = tuple(name for name in Pair.__slots__ if name not in ("prompt", *_OPTIONAL))


Record: TypeAlias = Prompt | Response | Example | Pair
R = TypeVar("R", Prompt, Response, Example, Pair)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object per line, atomically."""
    write_jsonl(path, (record.to_json() for record in records))


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Read the records of one file; raises DataError with the line that is not such a record."""
    records = []
    for line, row in read_jsonl(path):
        try:
            records.append(kind.from_json(row))
        except (KeyError, TypeError) as error:
            raise DataError(f"not a {kind.__name__} record ({error})", file=path, line=line) from None
    return records
