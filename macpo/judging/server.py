"""A chat model behind an OpenAI-compatible server, as a function from question to reply; a judge calls it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from macpo.engine.connection import Connection, Unavailable
from macpo.engine.errors import PeerError

if TYPE_CHECKING:
    from openai import OpenAI

MAX_REPLY_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said, and what it says of that: token counts, the model's version, why the reply ended."""

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    model: str = ""
    finish: str = ""


@dataclass
class Endpoint:
    """`endpoint(question, seed) -> Reply` by POST to `{base_url}/chat/completions`.

    `api_key_env` and `timeout_s` as in `Connection`; `timeout_s` bounds the reply as a whole, too. `temperature` None
    is not sent. Nothing is asked again, with one exception: a server that refuses `max_tokens` and names
    `max_completion_tokens` gets that from then on.

    Raises: Unavailable and RateLimited (timeout, connection, 408, 409, 429, 5xx, a reply that is not the protocol's);
    ConfigError (2) for a bad URL, a missing variable or package, 401 and 403; PeerError (7) for any other refusal.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float | None = 0.0
    connection: Connection = field(init=False, repr=False)
    limit_name: str = field(init=False, default="max_tokens")

    def __post_init__(self) -> None:
        self.connection = Connection(self.base_url, self.api_key_env, self.timeout_s)
        self._client: OpenAI | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the client, which all threads share; it is made with the first question."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _opened(self) -> OpenAI:
        with self._lock:
            if self._client is None:
                self._client = self.connection.client()
            return self._client

    def __call__(self, question: str, seed: int | None = None) -> Reply:
        name = self.limit_name
        try:
            return self._asked(question, seed, name)
        except PeerError as error:
            if name == "max_completion_tokens" or "max_completion_tokens" not in str(error):
                raise
        self.limit_name = "max_completion_tokens"
        return self._asked(question, seed, self.limit_name)

    def _asked(self, question: str, seed: int | None, limit_name: str) -> Reply:
        sent: dict[str, Any] = {limit_name: self.max_tokens}
        sent |= {} if self.temperature is None else {"temperature": self.temperature}
        sent |= {} if seed is None else {"seed": seed}
        client = self._opened()
        try:
            with client.chat.completions.with_streaming_response.create(
                model=self.model, messages=[{"role": "user", "content": question}], **sent
            ) as response:
                raw = _read(response.iter_bytes(), time.monotonic() + self.timeout_s)
        except Unavailable:
            raise
        except Exception as error:  # the request, with its key, stays out of the traceback
            raise self.connection.explained(error) from None
        try:
            body = json.loads(raw)
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise Unavailable(f"not a chat completion ({type(error).__name__})") from error
        if not isinstance(text, str):
            raise Unavailable("a chat completion without text")
        used = body.get("usage") if isinstance(body.get("usage"), dict) else {}
        return Reply(
            text.encode("utf-8", errors="replace").decode(),
            _count(used.get("prompt_tokens")),
            _count(used.get("completion_tokens")),
            *(
                value[:200] if isinstance(value, str) else ""
                for value in (body.get("model"), choice.get("finish_reason"))
            ),
        )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**40 else None


def _read(parts: Iterator[bytes], deadline: float) -> bytes:
    """Read the body within the size and time allowed: a server that sends slowly must not block a run for ever."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise Unavailable(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise Unavailable("the reply took too long")
        kept.append(part)
    return b"".join(kept)
