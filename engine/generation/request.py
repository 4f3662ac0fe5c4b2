"""Request, Sample and Output: what goes into a generator and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from macpo.engine.data.messages import Message
from macpo.engine.data.records import Prompt
from macpo.engine.errors import ConfigError, DataError, MacpoError, Problem
from macpo.engine.generation.params import SamplingParams

FinishReason = Literal["stop", "length"]


def request_key(*parts: str) -> int:
    """Hashes texts to a stable 63-bit integer: the request's part of the sampling noise."""
    digest = sha256("\x00".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def content_ids(prompts: Sequence[Sequence[int]] | Sequence[Sequence[Message]], *, chat: bool = False) -> list[str]:
    """One id per prompt: hash of its tokens (`chat`: its messages) and the number of its occurrence."""
    seen: Counter[str] = Counter()
    ids = []
    for prompt in prompts:
        content: Any = prompt
        digest = Prompt.of(content).id if chat else sha256(",".join(map(str, content)).encode()).hexdigest()[:16]
        ids.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return ids


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt that gets `len(samples)` responses.

    The text of a sample is a function of the model, `purpose`, `id`, sample index, `attempt`, prompt and params alone.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    samples: tuple[int, ...] = (0,)
    attempt: int = 0
    adapter: str | None = None
    purpose: str = ""
    """Keeps apart the noise of two callers (agents, iterations) that use the same ids and seed."""
    messages: tuple[Message, ...] = ()
    """The dialogue, for a served model with `api: chat`; `prompt_ids` then only say how it should be tokenised."""

    @property
    def key(self) -> int:
        """The request's part of the noise counter."""
        return request_key(self.purpose, self.id) if self.purpose else request_key(self.id)


@dataclass(slots=True)
class Sample:
    """One response.

    `token_ids` holds neither the EOS (or stop token) that ended it, nor tokens that lie wholly in a stop text: it is
    the fewest tokens that spell the text before the stop text, into which the last one may reach.
    `raw_logps` are the model's own log-probs of these tokens (nats, unprocessed logits over the whole vocabulary);
    `logps` are those of the distribution that was sampled (after penalty, temperature and filters; greedy: 0).
    `finish_reason` is "stop" where the model ended the response, "length" where the token budget did.
    `text` is set when the generator has a tokenizer: all tokens decoded without special tokens, up to the first
    occurrence of a stop text. It may end in U+FFFD where the token budget cut a character in two.
    A served model (`ServedGenerator`) gives no log-probs and, without a tokenizer, no ids but their number.
    """

    token_ids: list[int]
    raw_logps: list[float] | None
    logps: list[float] | None
    finish_reason: FinishReason
    text: str | None = None
    end_token: int | None = None
    """The EOS or stop token that ended it."""
    end_logp: float | None = None
    """Raw log-prob of `end_token`."""
    counted: int | None = None
    """Number of tokens by the server's count, its end token included, where `token_ids` are not known."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(slots=True)
class Output:
    """The responses to one request, in the order of its samples."""

    request_id: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        """The text of the first sample; None where the generator has no tokenizer."""
        return self.samples[0].text


MAX_PROBLEMS = 10
"""Most bad requests that one error names."""


def check_requests(
    requests: Sequence[Request],
    *,
    vocabulary: int,
    context_tokens: int | None,
    reserved: Callable[[Request], int],
    max_cache_tokens: int | None,
    has_tokenizer: bool,
    adapters: Collection[str],
) -> None:
    """Raises a ConfigError or DataError that says what is wrong with which requests.

    Args:
        vocabulary: number of token ids that the model can read.
        context_tokens: positions of the model; None: unlimited.
        reserved: gives the most cache tokens of a request.
        adapters: names of the loaded adapters.
    """
    data: list[Problem] = []
    config: list[Problem] = []
    seen: set[tuple[str, int, int]] = set()
    for request in requests:
        name, length = f"request {request.id}", len(request.prompt_ids)
        if not length:
            data.append(Problem("the prompt is empty", "give at least one token (BOS)", field=name))
        elif min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocabulary:
            text = f"a token id is outside the model's [0, {vocabulary})"
            data.append(Problem(text, "use the model's tokenizer", field=name))
        elif context_tokens is not None and length >= context_tokens:
            text = f"the prompt has {length} tokens, the model's context {context_tokens}"
            data.append(Problem(text, "shorten the prompt", field=name))
        elif max_cache_tokens is not None and reserved(request) > max_cache_tokens:
            text = f"prompt and response may take {reserved(request)} tokens, the cache {max_cache_tokens}"
            data.append(Problem(text, "raise max_cache_tokens or lower max_new_tokens", field=name))
        for sample in request.samples:
            if (key := (request.id, sample, request.attempt)) in seen:
                data.append(Problem("two requests have this id", "give every request an id of its own", field=name))
            seen.add(key)
        if request.params.stop and not has_tokenizer:
            config.append(Problem("stop texts need a tokenizer", "give one, or use stop_token_ids", field=name))
        if request.adapter is not None and request.adapter not in adapters:
            text = f"unknown adapter {request.adapter!r}; loaded: {', '.join(sorted(adapters)) or 'none'}"
            config.append(Problem(text, "load it first, or correct the name", field=name))
    for kind, problems in ((ConfigError, config), (DataError, data)):
        if problems:
            raise shortened(kind, problems)


def shortened(kind: type[MacpoError], problems: list[Problem]) -> MacpoError:
    """Builds an error that names the first few problems, and how many more there are."""
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(Problem(f"and {len(problems) - len(shown)} more like these"))
    return kind(problems=shown)
