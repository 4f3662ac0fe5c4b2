"""ActiveSequence: the host's record of one running sequence, and where its response ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from macpo.engine.errors import NumericsError
from macpo.engine.generation.params import SamplingParams
from macpo.engine.generation.request import FinishReason, Request, Sample


@dataclass(eq=False, slots=True)
class ActiveSequence:
    """A sequence that is being generated."""

    request: Request
    sample: int
    budget: int
    """Most new tokens, an end token included."""
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    raw_logps: list[float] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    done: bool = False
    """Whether the response is known to have ended."""
    ended: bool = False
    """Whether a stop token or stop text came."""
    end: tuple[int, float] | None = None
    """The stop token and its raw log-prob."""
    prefilled: int = 0
    """How many of `tokens` are part of the request's prompt: those that were drawn before it was prefilled again."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the sequence within a run: request id, attempt and sample."""
        return self.request.id, self.request.attempt, self.sample

    @property
    def position(self) -> int:
        """Position of the newest token in the cache."""
        return len(self.request.prompt_ids) - self.prefilled + len(self.tokens) - 1

    def rest(self) -> Request:
        """Returns the request for what is left to draw, whose prompt holds the tokens so far."""
        params = replace(self.params, max_new_tokens=self.params.max_new_tokens - len(self.tokens))
        prompt_ids = (*self.request.prompt_ids, *self.tokens)
        return replace(self.request, prompt_ids=prompt_ids, params=params, samples=(self.sample,))

    def resumed(self, rest: Request, budget: int) -> ActiveSequence:
        """Returns the sequence that draws at most `budget` more tokens for `rest()`."""
        num_tokens = len(self.tokens)
        return replace(self, request=rest, budget=num_tokens + budget, done=False, prefilled=num_tokens)

    def extend(self, tokens: Sequence[int], raw_logps: Sequence[float], logps: Sequence[float]) -> int:
        """Takes new tokens up to the budget or the first stop token; returns how many (none once it is done)."""
        if self.done:
            return 0
        keep = min(len(tokens), self.budget - len(self.tokens))
        end = next((i for i in range(keep) if tokens[i] in self.stop_ids), keep)
        self.tokens += tokens[:end]
        self.raw_logps += raw_logps[:end]
        self.logps += logps[:end]
        self.ended = end < keep
        if self.ended:
            self.end = tokens[end], raw_logps[end]
        self.done = self.ended or len(self.tokens) == self.budget
        return end

    def finish(self, tokenizer: Any) -> Sample:
        """Returns the sample, cut before a stop text."""
        if not all(map(math.isfinite, (*self.raw_logps, self.end[1] if self.end else 0.0))):
            fix = "check the weights, or generate in float32"
            raise NumericsError(f"the model's logits for request {self.request.id} are not finite", fix)
        keep, text, end = len(self.tokens), None, self.end or (None, None)
        if tokenizer is not None:
            text = decode(tokenizer, self.tokens)
            cut = find_stop(tokenizer, self.tokens, self.params.stop)
            if cut is not None:
                (keep, text), end = cut, (None, None)
                self.ended = True
        reason: FinishReason = "stop" if self.ended else "length"
        return Sample(self.tokens[:keep], self.raw_logps[:keep], self.logps[:keep], reason, text, *end)

    def stopped_in_tail(self, tokenizer: Any, num_new: int) -> bool:
        """Whether the newest tokens seem to hold a stop text; `finish` decides on the whole response."""
        stop = self.params.stop
        tail = self.tokens[-(num_new + 4 + max(map(len, stop))) :]
        text = decode(tokenizer, tail, special=True)
        return any(end in text for end in stop)


def decode(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """Decodes tokens to exactly the text that they spell."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def find_stop(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, str] | None:
    """(tokens to keep, text before the stop text), or None where no stop text occurs.

    Keeps the fewest tokens that spell the text before the stop text, into which the last one may reach.
    """
    if not stop:
        return None
    whole = decode(tokenizer, tokens, special=True)
    starts = [at for at in map(whole.find, stop) if at >= 0]
    if not starts:
        return None
    start = min(starts)
    low, high = 0, len(tokens)  # fewest tokens whose text is at least `start` characters long
    while low < high:
        middle = (low + high) // 2
        if len(decode(tokenizer, tokens[:middle], special=True)) >= start:
            high = middle
        else:
            low = middle + 1
    surplus = decode(tokenizer, tokens[:low], special=True)[start:]
    return low, decode(tokenizer, tokens[:low]).removesuffix(surplus)
