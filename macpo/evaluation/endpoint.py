"""A chat model behind an OpenAI-compatible server, as a function from prompt to reply; a judge calls it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from macpo.engine.connection import Connection, Unavailable

MAX_REPLY_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Endpoint:
    """`endpoint(prompt) -> reply` by POST to `{base_url}/chat/completions`.

    `api_key_env` and `timeout_s` as in `Connection`; `timeout_s` bounds the reply as a whole, too. Nothing is asked
    again: the judge keeps a record of every attempt.

    Raises: Unavailable and RateLimited (timeout, connection, 408, 409, 429, 5xx, a reply that is not the protocol's);
    ConfigError (2) for a bad URL, a missing variable or package, 401 and 403; PeerError (7) for any other refusal.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.0
    connection: Connection = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "connection", Connection(self.base_url, self.api_key_env, self.timeout_s))

    def __call__(self, prompt: str) -> str:
        with self.connection.client() as client:
            try:
                with client.chat.completions.with_streaming_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                ) as response:
                    raw = _read(response.iter_bytes(), time.monotonic() + self.timeout_s)
            except Unavailable:
                raise
            except Exception as error:  # the request, with its key, stays out of the traceback
                raise self.connection.explained(error) from None
        try:
            reply = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise Unavailable(f"not a chat completion ({type(error).__name__})") from error
        if not isinstance(reply, str):
            raise Unavailable("a chat completion without text")
        return reply


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
