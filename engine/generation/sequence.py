"""ActiveSequence: the host's record of one running sequence, and where its response ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from macpo.engine.errors import NumericsError
from macpo.engine.generation.params import SamplingParams
from macpo.engine.generation.request import FinishReason, Request, Sample
from macpo.engine.generation.response_text import cut_at_stop, decode, has_stopped


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
    suspect: bool = False
    """Whether some tokens seemed to hold a stop text."""

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
            cut = cut_at_stop(tokenizer, self.tokens, self.params.stop)
            if cut is not None:
                (keep, text), end = cut, (None, None)
                self.ended = True
        reason: FinishReason = "stop" if self.ended else "length"
        return Sample(self.tokens[:keep], self.raw_logps[:keep], self.logps[:keep], reason, text, *end)

    def has_stopped(self, tokenizer: Any, num_new: int) -> bool:
        """Whether a stop text has come for good; only the newest tokens are decoded as long as they hold none."""
        stop = self.params.stop
        if not self.suspect:
            window = num_new + 4 + max(len(one.encode(errors="surrogatepass")) for one in stop)  # a token a byte
            text = decode(tokenizer, self.tokens[-window:], special=True)
            self.suspect = any(one in text for one in stop)
        return self.suspect and has_stopped(tokenizer, self.tokens, stop)
