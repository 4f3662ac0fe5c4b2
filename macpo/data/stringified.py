"""Chat messages that were stored as text, as data frames and CSV files hold them: read back, or refused by name.

Text that is nothing but a list of messages is never meant as a response, so it is never trained on as plain text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any

TEXT_FIELDS = {"prompt", "chosen", "rejected", "response", "completion", "messages", "conversations"}
TEXT_FIELDS |= {"instruction", "output", "response_0", "response_1"}
"""Fields that hold messages in some layouts, or text that is trained on."""
_LOOKS_LIKE = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


def messages_in(text: str) -> Any:
    """Return the list of messages, or the message, that a text spells as JSON or as a Python literal; None for others.

    Raises ValueError for a text that begins like messages and is neither.
    """
    if not _LOOKS_LIKE.match(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if _is_messages(value):
            return value
    if _LOOKS_LIKE.match(text) and re.search(r"['\"](?:content|value)['\"]\s*:", text):
        raise ValueError("chat messages stored as text, in neither JSON nor Python's spelling")
    return None


def _is_messages(value: Any) -> bool:
    messages: Collection[Any] = value if isinstance(value, list) else [value]
    keys = ({"role"}, {"from", "value"})
    return bool(messages) and all(isinstance(m, dict) and any(k <= m.keys() for k in keys) for m in messages)
