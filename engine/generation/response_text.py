"""The text of a response: decoding, and where the first stop text cuts it.

Tokens and characters do not meet at the same places: a token may hold the end of one character and the beginning of
the next, one character may take several tokens, and some decoders read a run of byte tokens as a whole. So a text is
never put together from the texts of single tokens; everything here compares decoded prefixes with the decoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""Stands for bytes that are no character, which a character's first bytes are until the others have come."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # of byte fallback
_LONGEST_CHARACTER = 4  # bytes, so tokens


def decode(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """Decodes tokens to exactly the text that they spell."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut_at_stop(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, str] | None:
    """Cuts a response before the stop text that begins first; None where no stop text occurs.

    Stop texts are looked for in the decoded text, and in the same text with its special tokens spelled out.

    Returns:
        How many tokens to keep, and the text before the stop text. These are the fewest tokens that spell this text;
        the last of them may reach into the stop text.
    """
    if not stop:
        return None
    plain, spelled = (decode(tokenizer, tokens, special=special) for special in (False, True))
    cuts = []
    start = _first_start(plain, stop)
    if start >= 0:
        cuts.append((_fewest(tokenizer, tokens, plain[:start], special=False), plain[:start]))
    if spelled != plain and (start := _first_start(spelled, stop)) >= 0:
        keep = _fewest(tokenizer, tokens, spelled[:start], special=True)
        text, surplus = decode(tokenizer, tokens[:keep]), decode(tokenizer, tokens[:keep], special=True)[start:]
        last_is_special = not decode(tokenizer, tokens[max(keep - 1, 0) : keep])
        cuts.append((keep, text if last_is_special else text.removesuffix(surplus)))
    return min(cuts, key=lambda cut: (cut[0], len(cut[1])), default=None)


def has_stopped(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether a stop text has come, and no later token can change where `cut_at_stop` cuts.

    A longer stop text that began before it may still be incomplete, as may the newest character.
    """
    if _BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(tokens[-1]))):
        return False
    found = False
    for special in (False, True):
        text = decode(tokenizer, tokens, special=special).rstrip(INCOMPLETE)
        start = _first_start(text, stop)
        first_open = max(0, len(text) + 1 - max(map(len, stop)))
        tails = (text[at:] for at in range(first_open, len(text) if start < 0 else start))
        if any(one.startswith(tail) for tail in tails for one in stop):
            return False
        found |= start >= 0
    return found


def _first_start(text: str, stop: Sequence[str]) -> int:
    """Index at which the first stop text begins; -1 where there is none."""
    return min((at for at in map(text.find, stop) if at >= 0), default=-1)


def _fewest(tokenizer: Any, tokens: Sequence[int], text: str, *, special: bool) -> int:
    """The fewest tokens whose text begins with `text`, with which that of all tokens begins."""

    def spell_it(num_tokens: int) -> bool:
        return decode(tokenizer, tokens[:num_tokens], special=special).startswith(text)

    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if spell_it(middle) else (middle + 1, high)
    # In a run of byte tokens only whole characters spell anything, so the search may have missed a shorter prefix.
    while shorter := [n for n in range(max(high - _LONGEST_CHARACTER, 0), high) if spell_it(n)]:
        high = shorter[0]
    return high
