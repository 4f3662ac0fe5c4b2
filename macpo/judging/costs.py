"""What judging will cost, before anything is asked: questions, tokens, and money where prices are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CHARS_PER_TOKEN = 4
"""Of English text under the tokenizers of large models; where the judge's own tokenizer is here, that counts."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Money for a million tokens, in any currency."""

    tokens_in: float
    tokens_out: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Questions to ask, those that are answered already, and tokens of the questions to ask."""

    questions: int
    known: int
    tokens_in: int
    most_tokens_out: int
    counted: bool
    """Whether a tokenizer counted `tokens_in`; else they are characters over CHARS_PER_TOKEN."""

    def lines(self, prices: Prices | None) -> list[str]:
        """The estimate in words."""
        how = "by its tokenizer" if self.counted else f"{CHARS_PER_TOKEN} characters a token"
        out = f"at most {self.most_tokens_out:,}" if self.most_tokens_out or not self.questions else "none"
        found = [
            f"{self.questions:,} question{'s' * (self.questions != 1)} to ask, {self.known:,} answered already",
            f"{self.tokens_in:,} tokens in ({how}), {out} out",
        ]
        if prices is not None:
            money = (self.tokens_in * prices.tokens_in + self.most_tokens_out * prices.tokens_out) / 1e6
            each = f"{prices.tokens_in:g} in and {prices.tokens_out:g} out for a million tokens"
            found.append(f"at most {money:,.2f} ({each}), without questions that have to be asked again")
        return found


def cost_of(questions: Sequence[str], known: int, reply_tokens: int, count: Callable[[str], int] | None = None) -> Cost:
    """The cost of asking questions.

    Args:
        questions: those to ask, one entry for each vote.
        known: how many others are answered already.
        reply_tokens: longest reply; 0 for a judge that writes none.
        count: tokens of a question; None goes by characters.
    """
    tokens = sum(count(each) if count else -(-len(each) // CHARS_PER_TOKEN) for each in questions)
    return Cost(len(questions), known, tokens, len(questions) * reply_tokens, count is not None)
