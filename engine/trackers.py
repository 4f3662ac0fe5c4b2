"""Experiment trackers beside metrics.jsonl: whatever goes wrong in one is said once, and training goes on."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a tracker is asked to do; it may raise anything at any time."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimiser step."""
        ...

    def close(self) -> None:
        """No more steps come."""
        ...


Factory = Callable[[str, Path], Tracker]  # (name of the stage, folder to write into) -> tracker


class Trackers:
    """Several trackers as one that never raises.

    Args:
        names: `tensorboard` (needs the package of that name), or `module:function` with the signature of `Factory`.
        stage: what the curves are called.
        folder: for trackers that write files; not part of a stage's result.
    """

    def __init__(self, names: Sequence[str], stage: str, folder: Path) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._open.update({name: _factory(name)(stage, folder)}))  # type: ignore[misc]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one step's numbers to every tracker that still works."""
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, metrics))  # type: ignore[misc]

    def close(self) -> None:
        """Close every tracker that still works."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open = {}

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's failure is none of the run's business
            self._open.pop(name, None)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning("tracker %s failed (%s); training goes on, metrics.jsonl is complete", name, why)


def _factory(name: str) -> Factory:
    if name == "tensorboard":
        return _TensorBoard
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"use tensorboard or module:function, not {name!r}")
    return getattr(importlib.import_module(module), function)


class _TensorBoard:
    def __init__(self, stage: str, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / stage))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()
