"""SamplingParams: how one request's responses are drawn; checked when created."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from macpo.engine.config import SamplingSettings
from macpo.engine.errors import ConfigError

MAX_SEED = 2**63 - 1
MAX_SAMPLES = 4096
"""Most samples of a request that the noise counter has room for."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn; filters apply in Hugging Face's order: penalty, temperature, top-k, top-p, min-p.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this; 1 turns it off."""
    top_k: int = 0
    """Only the k most likely tokens; 0 turns it off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the best one; 0 turns it off."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens seen in prompt or response; 1 turns it off."""
    max_new_tokens: int = 256
    """Most tokens of a response; fewer where the model's context ends."""
    n: int = 1
    """Number of samples per prompt; they share its prefill."""
    seed: int = 0
    """Key of the noise; with the request's id it fixes the text, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """The response ends where the first of these texts begins (needs a tokenizer): its text is that of the response
    without stop texts up to there. Only the response is searched, not the prompt."""
    stop_token_ids: tuple[int, ...] = ()
    """The response ends before the first of these tokens, as it does before EOS."""
    ignore_eos: bool = False
    """Treats EOS as a token like any other; `stop_token_ids` still end the response."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        rules = (
            ("temperature", _number(self.temperature, 0.0), "a finite number >= 0"),
            ("top_p", _number(self.top_p, 0.0, 1.0) and self.top_p > 0, "in (0, 1]"),
            ("top_k", _whole(self.top_k, 0), "a whole number >= 0"),
            ("min_p", _number(self.min_p, 0.0, 1.0), "in [0, 1]"),
            ("repetition_penalty", _number(self.repetition_penalty, 0.0) and self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number >= 1"),
            ("n", _whole(self.n, 1, MAX_SAMPLES), f"a whole number in [1, {MAX_SAMPLES}]"),
            ("seed", _whole(self.seed, 0, MAX_SEED), "a whole number in [0, 2**63)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty texts"),
            ("stop_token_ids", all(_whole(i, 0) for i in self.stop_token_ids), "whole numbers >= 0"),
        )
        for name, good, allowed in rules:
            if not good:
                raise ConfigError(f"got {getattr(self, name)!r}", f"{name} must be {allowed}", field=f"sampling.{name}")

    @classmethod
    def of(cls, settings: SamplingSettings, **rest: Any) -> Self:
        """Builds params from a recipe's sampling block; `rest` gives n, seed, stop, ..."""
        return cls(**settings.model_dump(), **rest)


def _whole(value: object, low: int, high: int | None = None) -> bool:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    return good and (high is None or int(value) <= high)  # type: ignore[call-overload]


def _number(value: object, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high


DEFAULT = SamplingParams()
"""The model's own distribution, one sample."""


def one_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Expands params to one per prompt; raises ConfigError where the numbers differ."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling params for {count} prompts", "give one, or one per prompt")
    return list(params)
