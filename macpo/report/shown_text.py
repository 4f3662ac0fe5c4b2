"""Text of models and data as a page may show it, before it is escaped: no control characters, and not without end."""

from __future__ import annotations

import re
from typing import Any

MAX_CHARS = 1500
# control characters, those that turn the direction of the text after them, and those that hide in it
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    """Return text in which U+FFFD stands for control and direction characters."""
    return _CONTROL.sub("\ufffd", text)


def clip(text: Any, limit: int = MAX_CHARS) -> str:
    """Return text for a page, not yet escaped; cut very long text."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[:limit]} … ({len(shown) - limit} more characters)"
