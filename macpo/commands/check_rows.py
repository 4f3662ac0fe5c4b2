"""Every row as an agent will read it: what is cut, dropped or refused, and the file and line of what cannot be read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from macpo.data.spool import Records
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Example, Pair
from macpo.engine.errors import DataError
from macpo.engine.progress import RowProgress
from macpo.method.refusals import about, is_refusal
from macpo.recipe_kinds import AnyRecipe

Rows = Sequence[Pair | Example]
_SHOWN_ROWS = 100


def encode_rows(chat: Chat, rows: Rows, recipe: AnyRecipe, what: str, *, answers: bool = True) -> str:
    """Encode all rows as the run will, and say what becomes of them; `answers`: whether these are read too.

    Raises DataError, with the row's file, line and prompt, for one that the run would stop at, or if none is left.
    """
    counts: Counter[str] = Counter()
    began, kept = time.monotonic(), 0
    progress = RowProgress(f"check {what}", len(rows))
    try:
        for index, row in enumerate(rows):
            if index % _SHOWN_ROWS == 0:
                progress.update(index)
            try:
                kept += _encode(chat, row, recipe, counts, answers)
            except DataError as error:
                if recipe.data.refused == "error" or not is_refusal(error):
                    raise about(error, row.prompt, *(rows.where(index) if isinstance(rows, Records) else ())) from error
                counts["refused by the template and dropped"] += 1
    finally:
        progress.close()
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none is cut or dropped"
    if rows and not kept:
        fix = "raise context_tokens, set data.long_prompt to truncate, or use another template"
        raise DataError(f"none of {len(rows):,} rows ({what}) is left: {found}", fix, field="data")
    return f"  all {len(rows):,} rows, {what}: {found} ({time.monotonic() - began:.1f} s)"


def _encode(chat: Chat, row: Pair | Example, recipe: AnyRecipe, counts: Counter[str], answers: bool) -> bool:
    """Count what happens to one row; return whether it is kept."""
    limit, policy, messages = recipe.max_prompt_tokens, recipe.data.long_prompt, row.prompt.messages
    prompt = chat.limited_prompt_ids(messages, limit, long_prompt=policy)
    if prompt is None:
        counts["prompts too long and dropped"] += 1
        return False
    if len(prompt) == limit and len(chat.prompt_ids(messages)) > limit:
        counts["prompts cut"] += 1
    if not answers:
        return True
    sides: dict[str, Any] = (
        {"": row.answer} if isinstance(row, Example) else {"chosen ": row.chosen, "rejected ": row.rejected}
    )
    group = chat.group(
        messages,
        [(text, True) for text in sides.values()],
        max_tokens=recipe.context_tokens,
        max_prompt_tokens=limit,
        long_prompt=policy,
    )
    assert group is not None
    room = recipe.context_tokens - len(group.prompt_ids)
    for (side, text), ids in zip(sides.items(), group.responses, strict=True):
        if len(ids) >= room and len(chat.answer_ids(text)) > room:
            counts[f"{side}answers cut"] += 1
    if len(sides) == 2 and list(group.responses[0]) == list(group.responses[1]):
        counts["pairs identical as tokens"] += 1
    return True
