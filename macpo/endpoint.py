"""A very small client for OpenAI-compatible chat endpoints, standard library only."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from macpo.engine.errors import ConfigError, PeerError

MAX_REPLY_BYTES = 4 * 2**20
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Unavailable(Exception):
    """The endpoint did not answer properly this time; asking again may help."""


class RateLimited(Unavailable):
    """HTTP 429; `retry_after_s` is what the server asks for, where it says so in seconds."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None  # the key must not travel to another host


@dataclass(frozen=True)
class Endpoint:
    """`endpoint(prompt) -> reply` by POST to `{base_url}/chat/completions`.

    `api_key_env` is the NAME of an environment variable; its value is read for each request, sent in the
    Authorization header and put nowhere else. None for servers without a key. `timeout_s` bounds every wait for the
    server, and the body as a whole.

    Raises: Unavailable and RateLimited (timeout, connection, 408, 409, 429, 5xx, a reply that is not the protocol's);
    ConfigError (2) for a bad URL, a missing variable, 401 and 403; PeerError (7) for any other refusal.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.base_url!r} is not an http(s) URL", "give for example https://host/v1")
        if parts.username or parts.password:
            raise ConfigError("the URL holds a password", "put the key into an environment variable and name it")
        if parts.scheme == "http" and self.api_key_env is not None and parts.hostname not in _LOOPBACK:
            raise ConfigError("a key would travel unencrypted over http", "use https, or api_key_env: null")

    def __call__(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise ConfigError(f"the environment variable {self.api_key_env} is not set", "export it with the key")
            if not (key.isascii() and key.isprintable()):  # http.client's own error would print the value
                raise ConfigError(f"the value of {self.api_key_env} cannot be sent in a header", "export it again")
            headers["Authorization"] = f"Bearer {key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        raw = self._post(urllib.request.Request(url, json.dumps(body).encode(), headers))
        try:
            reply = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Unavailable(f"not a chat completion ({type(error).__name__})") from error
        if not isinstance(reply, str):
            raise Unavailable("a chat completion without text")
        return reply

    def _post(self, request: urllib.request.Request) -> bytes:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urllib.parse.urlsplit(self.base_url).hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout_s) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None  # the request, with its key, stays out of the traceback
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise Unavailable(f"no answer: {getattr(error, 'reason', None) or error or type(error).__name__}") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        if error.code == 429:
            after = (error.headers.get("Retry-After") or "").strip()
            return RateLimited("HTTP 429", float(after) if after.isdecimal() else None)
        if error.code in (408, 409) or error.code >= 500:
            return Unavailable(f"HTTP {error.code}")
        if error.code in (401, 403):
            return ConfigError(f"{self.base_url} refuses the key (HTTP {error.code})", f"check {self.api_key_env}")
        return PeerError(f"{self.base_url} answers HTTP {error.code}", "check base_url and the model's name")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, within the size and time allowed: a server that drips bytes must not hold a run for ever."""
    parts, size = [], 0
    while part := response.read1(65536):
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise Unavailable(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise Unavailable("the reply took too long")
        parts.append(part)
    return b"".join(parts)
