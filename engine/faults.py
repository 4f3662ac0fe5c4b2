"""Fault injection: named points in the code at which a test can kill the process.

    MACPO_KILL_AT=stage-manifest:2 macpo run recipe.yaml      # SIGKILL the second time that point is passed
    MACPO_KILL_AT=stage-manifest:2:group …                    # the whole process group, workers and ranks included

Nothing happens while the variable is unset. The count is kept per process.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

POINTS: dict[str, str] = {
    "file-created": "a temporary file beside the target exists and is empty",
    "file-written": "the temporary file is complete, not yet synced",
    "file-synced": "the temporary file is on disk, the target is still the old one",
    "file-renamed": "the target is the new one, its folder not yet synced",
    "append-torn": "half of the bytes of an append are in the file",
    "append-written": "an append is complete, not yet synced",
    "append-synced": "an append is on disk",
    "set-aside": "a folder to delete (a stage to redo, an older checkpoint) is renamed, not yet deleted",
    "lock-taken": "the run folder's lock is held",
    "rerun-noted": "the wish to redo stages is on disk, nothing is discarded yet",
    "stage-created": "a stage's .tmp folder exists, its RUNNING marker does not",
    "stage-started": "the RUNNING marker is on disk",
    "stage-ran": "the stage's function has returned",
    "stage-hashed": "the outputs are synced and hashed, there is no manifest yet",
    "stage-manifest": "the manifest is in the .tmp folder",
    "stage-unmarked": "the RUNNING marker is gone, the folder still has its .tmp name",
    "stage-renamed": "the folder has its final name, the run folder is not yet synced",
    "stage-committed": "the stage is done",
    "checkpoint-torn": "half of a rank's tensors are in its shard of a training checkpoint",
    "checkpoint-shards": "a rank's shard is written and read back, there is no manifest yet",
    "checkpoint-manifest": "a training checkpoint's manifest is in the .tmp folder",
    "checkpoint-renamed": "a training checkpoint has its final name, older ones are still there",
    "run-finished": "every stage is done, the lock is still held",
}

_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Kill the process with SIGKILL here if MACPO_KILL_AT says so.

    Raises: KeyError for a name that POINTS does not document; ValueError for a MACPO_KILL_AT that names no point.
    """
    if name not in POINTS:
        raise KeyError(f"fault point {name!r} is not documented in POINTS")
    wish = os.environ.get("MACPO_KILL_AT")
    if not wish:
        return
    target, _, rest = wish.partition(":")
    count, _, scope = rest.partition(":")
    if target not in POINTS or scope not in ("", "group") or not (count or "1").isdigit():
        raise ValueError(f"MACPO_KILL_AT={wish!r}: expected POINT[:COUNT[:group]], POINT one of {', '.join(POINTS)}")
    if target != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        if scope == "group":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
