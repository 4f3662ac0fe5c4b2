"""Detects loss spikes: values far above the loss's recent mean.

Undoing a finished step is expensive, so a loss is judged before the update. The trainer decides what happens then
(`OptimSettings.on_spike`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WARM_UP = 20
"""The first values, which only update the running mean and are never judged."""
WINDOW = 100
"""The n-th value's weight in the running mean is 1/n, and 1/WINDOW from the WINDOW-th value on."""
FLOOR = 0.01
"""Lower bound of the deviation as a share of the mean, so that noise on a flat curve is no spike."""


class SpikeGuard:
    """Running mean and deviation of a loss: exact over the first WINDOW values, exponentially weighted after that.

    A spike is clipped to the threshold before it updates the running values, so one outlier does not hide the next,
    and a loss that stays high becomes the new normal.

    Args:
        sigma: a value more than this many deviations above the mean is a spike.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        self._count = 0
        self._mean = 0.0
        self._variance = 0.0

    def judge(self, value: float) -> float | None:
        """How many deviations a spike lies above the mean, None for any other value; changes nothing."""
        if self._count < WARM_UP:
            return None
        score = (value - self._mean) / self._deviation
        return score if score > self.sigma else None

    def see(self, value: float) -> float | None:
        """`judge` the value, then update mean and deviation with it. Raises ValueError if it is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"a loss of {value} has no place in a running mean")
        score = self.judge(value)
        if score is not None:
            value = self._mean + self.sigma * self._deviation
        self._count += 1
        weight = 1.0 / min(self._count, WINDOW)
        step = value - self._mean
        self._mean += weight * step
        self._variance = (1.0 - weight) * (self._variance + weight * step * step)
        return score

    @property
    def _deviation(self) -> float:
        # the last term only matters where all values were zero
        return max(math.sqrt(self._variance), FLOOR * abs(self._mean), 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """The JSON-able state; a guard that loads it judges exactly as this one does."""
        return {"count": self._count, "mean": self._mean, "variance": self._variance}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._count, self._mean = int(state["count"]), float(state["mean"])
        self._variance = float(state["variance"])
