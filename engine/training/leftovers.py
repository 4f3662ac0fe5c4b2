"""What an interrupted training leaves in its folder for the next attempt."""

from __future__ import annotations

from pathlib import Path

from macpo.engine.errors import MacpoError
from macpo.engine.files import read_json

SCRATCH = ("checkpoint",)
"""Folders that it resumes from; they go once the stage is finished."""
CONTINUED = ("metrics.jsonl", "timing.jsonl")
"""Files that it goes on with."""


def goes_on_from(folder: Path) -> str:
    """The step that the next attempt goes on from, as `step 24 of 48`; empty where no checkpoint was saved."""
    checkpoints = sorted((folder / SCRATCH[0]).glob("step-" + "[0-9]" * 8), reverse=True)
    for path in checkpoints[:1]:
        try:
            state = read_json(path / "state.json")
        except (MacpoError, OSError):
            break
        step, steps = (state.get(key) for key in ("step", "steps")) if isinstance(state, dict) else (None, None)
        if isinstance(step, int):
            return f"step {step:,} of {steps:,}" if isinstance(steps, int) else f"step {step:,}"
    return ""
