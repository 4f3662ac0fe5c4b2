"""Every row as an agent will read it: what is cut, dropped or refused, and the file and line of what cannot be read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Example, Pair
from macpo.engine.errors import DataError, TemplateRefusal
from macpo.engine.progress import Progress
from macpo.method.encoding import cuts, encoded, is_cut, limited_prompt, pair_responses
from macpo.method.policies import StageAgent

Rows = Sequence[Pair | Example]
Reading = Literal["prompts", "answers", "pairs"]
"""What a run reads of rows: the prompts alone, the responses one by one, or pairs, which must differ as tokens."""
_SHOWN_ROWS = 100


def encode_rows(chat: Chat, agent: StageAgent, rows: Rows, what: str, reading: Reading) -> str:
    """Encode all rows as the run will, and say what becomes of them.

    Raises DataError, with the row's file, line and prompt, for one that the run would stop at, or if none is left.
    """
    counts: Counter[str] = Counter()
    began, kept = time.monotonic(), 0
    progress = Progress(f"check {what}", "rows", len(rows), leave=False)  # what is found says how many
    try:
        for index, row in enumerate(rows):
            if index % _SHOWN_ROWS == 0:
                progress.update(index)
            try:
                kept += _encode(chat, agent, row, reading, counts)
            except TemplateRefusal:
                if agent.refused == "error":
                    raise
                counts["refused by the template and dropped"] += 1
    finally:
        progress.close()
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none is cut or dropped"
    if rows and not kept:
        room = "raise context_tokens (prompt_tokens, where it is set)"
        fix = f"{room}, set data.long_prompt to truncate, or use another template"
        raise DataError(f"none of {len(rows):,} rows ({what}) is left: {found}", fix, field="data")
    return f"  all {len(rows):,} rows, {what}: {found} ({time.monotonic() - began:.1f} s)"


def _encode(chat: Chat, agent: StageAgent, row: Pair | Example, reading: Reading, counts: Counter[str]) -> bool:
    """Count what happens to one row; return whether it is kept."""
    prompt = limited_prompt(chat, agent, row.prompt)
    if prompt is None:
        counts["prompts too long and dropped"] += 1
        return False
    if len(prompt) == agent.max_prompt_tokens and len(chat.prompt_ids(row.prompt.messages)) > len(prompt):
        counts["prompts cut"] += 1
    if reading == "prompts":
        return True
    responses = [(row.reply, row.finished)] if isinstance(row, Example) else pair_responses(row)
    group = encoded(chat, agent, row.prompt, responses)
    assert group is not None  # its prompt is not
    if isinstance(row, Example):
        counts.update(["responses cut"] * is_cut(chat, group, 0, row.finished))
        return True
    counts.update(f"{name.removeprefix('cut_')} responses cut" for name in cuts(chat, group, row))
    if reading == "pairs" and group.responses[0] == group.responses[1]:
        counts["pairs identical as tokens and dropped"] += 1
        return False
    return True
