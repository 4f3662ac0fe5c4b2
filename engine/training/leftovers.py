"""What an interrupted training leaves in its folder for the next attempt."""

SCRATCH = ("checkpoint",)
"""Folders that it resumes from; they go once the stage is finished."""
CONTINUED = ("metrics.jsonl", "timing.jsonl")
"""Files that it goes on with."""
