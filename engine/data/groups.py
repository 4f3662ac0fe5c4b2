"""A prompt and its responses as token ids: what is scored, trained on and packed."""

from __future__ import annotations

from dataclasses import dataclass

from macpo.engine.errors import DataError


@dataclass(slots=True)
class PrefixGroup:
    """One prompt and the responses that share it: n = 2 is a preference pair, n = 1 SFT or a document."""

    prompt_ids: list[int]
    responses: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed group; the prompt counts once."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def num_response_tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def max_length(self) -> int:
        """Tokens of the prompt with its longest response: the positions that the model must have."""
        return len(self.prompt_ids) + max(map(len, self.responses), default=0)

    def check(self, name: str = "group") -> None:
        """Raise DataError if a response cannot be predicted: no prompt token, or an empty response."""
        if not self.prompt_ids:
            raise DataError("the prompt has no token", "give the prompt a BOS token or some text", field=name)
        if not self.responses or not all(self.responses):
            raise DataError("a response has no token", "drop empty responses before packing", field=name)
