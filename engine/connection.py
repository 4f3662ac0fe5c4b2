"""Connections to OpenAI-compatible servers through the `openai` client; keys stay out of every message and file."""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from macpo.engine.errors import ConfigError, PeerError, beginning

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Unavailable(Exception):
    """The server did not answer properly this time; asking again may help."""


class RateLimited(Unavailable):
    """HTTP 429; `retry_after_s` is what the server asks for, where it says so in seconds."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def url_problem(base_url: str, api_key_env: str | None) -> tuple[str, str] | None:
    """(problem, remedy) of a server's URL; None if the URL can be used."""
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"is no http(s) URL: {base_url!r}", "give for example http://127.0.0.1:8000/v1"
    if parts.username or parts.password:
        return "holds a password", "put the key into an environment variable and name it in api_key_env"
    if parts.scheme == "http" and api_key_env is not None and parts.hostname not in _LOOPBACK:
        return "would carry the key unencrypted over http", "use https, or api_key_env: null"
    return None


@dataclass(frozen=True)
class Connection:
    """How to reach a server.

    `api_key_env` is the NAME of an environment variable, None for servers without a key; its value is read when a
    client is created, sent in the Authorization header and stored nowhere else. `timeout_s` bounds every wait for
    the server, `max_retries` the retries after a time-out, a lost connection, 408, 409, 429 and 5xx (with growing
    waits, or those that the server requests). Raises ConfigError for a URL that cannot be used.
    """

    base_url: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    max_retries: int = 0

    def __post_init__(self) -> None:
        if problem := url_problem(self.base_url, self.api_key_env):
            raise ConfigError(f"it {problem[0]}", problem[1], field="base_url")

    def client(self) -> OpenAI:
        """A client to be closed by the caller; raises ConfigError without `openai` or the key's variable."""
        openai = _openai()
        return _without_environment(openai.OpenAI(http_client=openai.DefaultHttpxClient(**self._http), **self._options))

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio."""
        openai = _openai()
        http = openai.DefaultAsyncHttpxClient(**self._http)
        return _without_environment(openai.AsyncOpenAI(http_client=http, **self._options))

    @property
    def _http(self) -> dict[str, Any]:
        """No redirects, so that the key never reaches another host; no proxy for servers on this machine."""
        local = urllib.parse.urlsplit(self.base_url).hostname in _LOOPBACK
        return {"follow_redirects": False, "trust_env": not local}

    @property
    def _options(self) -> dict[str, Any]:
        """Client options with an explicit key, so that the client never sends OPENAI_API_KEY to another server."""
        key = "none" if self.api_key_env is None else self._key(self.api_key_env)
        options = {"timeout": self.timeout_s, "max_retries": self.max_retries}
        return {"base_url": self.base_url, "api_key": key, **options}

    def _key(self, name: str) -> str:
        key = os.environ.get(name, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {name} is not set", "export it with the key")
        if not (key.isascii() and key.isprintable()):  # an HTTP client's own error would print the value
            raise ConfigError(f"the value of {name} cannot be sent in a header", "export it again")
        return key

    def explained(self, error: Exception) -> Exception:
        """Translate an exception of the `openai` client, leaving out headers, keys and request.

        Unavailable and RateLimited: a retry may help. ConfigError (2): the key is refused. PeerError (7): any other
        refusal. Exceptions that are not the client's are returned unchanged.
        """
        import httpx2  # openai is built on it and lets its errors through while a body is read

        openai = _openai()
        if not isinstance(error, openai.OpenAIError | httpx2.HTTPError | OSError | ValueError):
            return error
        if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException | TimeoutError):
            return Unavailable(f"no answer: timed out after {self.timeout_s:g} s")
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            cause = error.__cause__ or error
            return Unavailable(f"no answer: {cause or type(cause).__name__}")
        if not isinstance(error, openai.APIStatusError):
            return Unavailable(f"not a reply of the protocol ({type(error).__name__})")
        code = error.status_code
        if code == 429:
            after = (error.response.headers.get("Retry-After") or "").strip()
            return RateLimited("HTTP 429", float(after) if after.isdecimal() else None)
        if code in (408, 409) or code >= 500:
            return Unavailable(f"HTTP {code}")
        if code in (401, 403):
            return ConfigError(f"{self.base_url} refuses the key (HTTP {code})", f"check {self.api_key_env}")
        said = self._said(error) if code in (400, 404, 422) else ""
        fix = "check base_url and the model's name"
        return PeerError(f"{self.base_url} answers HTTP {code}{said and ': '}{said}", fix)

    def _said(self, error: Any) -> str:
        """The server's own message in one line, or empty."""
        body = error.body if isinstance(error.body, dict) else {}
        text = " ".join(str(body.get("message") or body.get("detail") or "").split())
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return beginning(text.replace(key, "…") if key else text, 200)


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ConfigError("asking a server needs the package openai", "pip install 'macpo[served]'") from None
    return openai


def _without_environment(client: Any) -> Any:
    """Drop what the client reads from OPENAI_ORG_ID and OPENAI_PROJECT_ID, which other servers do not use."""
    client.organization = client.project = None
    return client
