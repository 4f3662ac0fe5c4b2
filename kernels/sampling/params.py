"""SampleParams: how each row of a batch is drawn.

Legend: b rows, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Below this, logits / temperature may overflow; a temperature that small means 0.
MIN_TEMPERATURE = 1e-4


@dataclass(eq=False)
class SampleParams:
    """Sampling settings of B rows; a scalar stands for every row. Checked once, when made."""

    seed: Tensor
    """int64 [B]: the run's seed, the key of the noise (any 64-bit integer)."""
    temperature: Tensor
    """float32 [B], 0 or >= 1e-4; 0 takes the most likely token."""
    top_p: Tensor
    """float32 [B] in (0, 1]: the smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: Tensor
    """int64 [B]: only the k most likely tokens (and those that tie with the k-th); 0 is off."""
    min_p: Tensor
    """float32 [B] in [0, 1]: only tokens at least this fraction as likely as the best one; 0 is off."""
    repetition_penalty: Tensor
    """float32 [B], > 0: divides the positive and multiplies the negative logits of seen tokens; 1 is off."""
    seen: Tensor | None = None
    """bool [B, V]: tokens of the prompt and the response so far; the caller keeps it up to date, in place."""
    facts: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Facts that the backends derive from the settings once, such as which filters any row uses."""

    def __init__(
        self,
        seed: int | Tensor,
        temperature: float | Tensor = 1.0,
        top_p: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        min_p: float | Tensor = 0.0,
        repetition_penalty: float | Tensor = 1.0,
        seen: Tensor | None = None,
        *,
        batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Take tensors of [B], or scalars with `batch` (needed when all are scalars).

        Raises:
            ValueError: a value out of its range, lengths that differ, a penalty without `seen`.
        """
        given = {
            "seed": (_signed(seed) if isinstance(seed, int) else seed, torch.int64),
            "temperature": (temperature, torch.float32),
            "top_p": (top_p, torch.float32),
            "top_k": (top_k, torch.int64),
            "min_p": (min_p, torch.float32),
            "repetition_penalty": (repetition_penalty, torch.float32),
        }
        tensors = [value for value, _ in given.values() if isinstance(value, Tensor) and value.dim()]
        if batch is None:
            if not tensors:
                raise ValueError("SampleParams of scalars only needs batch=")
            batch = tensors[0].numel()
        device = device or (tensors[0].device if tensors else "cpu")
        for name, (value, dtype) in given.items():
            made = torch.as_tensor(value, device=device).to(dtype)
            if made.dim() and made.shape != (batch,):
                raise ValueError(f"SampleParams.{name} must be [{batch}], got {list(made.shape)}")
            setattr(self, name, made.expand(batch).contiguous())
        if seen is not None and (seen.dtype != torch.bool or seen.dim() != 2 or seen.shape[0] != batch):
            raise ValueError(f"SampleParams.seen must be bool [{batch}, V], got {seen.dtype} {list(seen.shape)}")
        self.seen = seen
        self.facts = {}
        self._check()

    def _check(self) -> None:
        bad = {
            f"temperature must be 0 or in [{MIN_TEMPERATURE}, inf)": ~self.temperature.isfinite()
            | ((self.temperature < MIN_TEMPERATURE) & (self.temperature != 0)),
            "top_p must be in (0, 1]": ~((self.top_p > 0) & (self.top_p <= 1)),
            "top_k must not be negative": self.top_k < 0,
            "min_p must be in [0, 1]": ~((self.min_p >= 0) & (self.min_p <= 1)),
            "repetition_penalty must be finite and positive": ~(
                self.repetition_penalty.isfinite() & (self.repetition_penalty > 0)
            ),
        }
        for message, rows in bad.items():
            if bool(rows.any()):
                raise ValueError(f"SampleParams: {message}; wrong in row {int(rows.nonzero()[0])}")
        penalised = bool((self.repetition_penalty != 1).any())
        if penalised and self.seen is None:
            raise ValueError("SampleParams: repetition_penalty needs `seen`, the tokens so far")
        self.facts = {
            "penalised": penalised,
            "greedy": bool((self.temperature == 0).all()),
            "any_greedy": bool((self.temperature == 0).any()),
            "top_ks": tuple(int(k) for k in self.top_k.unique().tolist()),
            "top_p": bool((self.top_p < 1).any()),
            "min_p": bool((self.min_p > 0).any()),
        }

    @property
    def settings(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The settings of [B] in their order, without `seen`."""
        return self.seed, self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty

    def __len__(self) -> int:
        return self.seed.numel()

    @classmethod
    def of_checked(
        cls, seed: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, repetition_penalty: Tensor,
        seen: Tensor | None, facts: dict[str, Any],
    ) -> SampleParams:  # fmt: skip
        """Settings and facts of another SampleParams, which has checked them: no value is checked again."""
        made = cls.__new__(cls)
        made.seed, made.temperature, made.top_p, made.top_k = seed, temperature, top_p, top_k
        made.min_p, made.repetition_penalty, made.seen, made.facts = min_p, repetition_penalty, seen, facts
        return made

    def select(self, rows: Tensor) -> SampleParams:
        """The settings of the rows with these indices (int64 [B'])."""
        seed, temperature, top_p, top_k, min_p, penalty = (x[rows] for x in self.settings)
        seen = None if self.seen is None else self.seen[rows]
        return SampleParams(seed, temperature, top_p, top_k, min_p, penalty, seen)


def _signed(seed: int) -> int:
    """The int64 with the seed's 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed
