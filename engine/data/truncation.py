"""How a dialogue that is too long is shortened: as a shorter dialogue, never in the middle of what a template writes.

The oldest turns go first, a user's turn with all that answers it, so that what is left begins with a user's turn, and
no tool's result stays without its call; the system message stays. If the last turn does not fit with it, the system
message goes too; then the last turn's text loses its beginning. Every dialogue is rendered anew, so BOS, the tools and
every turn marker are where the template puts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from macpo.engine.data.messages import Message, split_tools, with_tools

Encode = Callable[[Sequence[Message]], list[int]]


def shortened(messages: Sequence[Message], encode: Encode, max_tokens: int) -> list[int] | None:
    """Token ids of the longest end of the dialogue that has at most max_tokens tokens; None where none has.

    Args:
        encode: gives the token ids of a dialogue.
    """
    turns, tools = split_tools(messages)
    first = next((n for n, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), len(turns))
    system, turns = turns[:first], turns[first:]
    starts = [n for n, turn in enumerate(turns) if turn["role"] == "user"] or [0]

    def ids(dialogue: list[Message]) -> list[int] | None:
        found = encode(with_tools(dialogue, tools or []))
        return found if len(found) <= max_tokens else None

    for start in starts:
        if (found := ids([*system, *turns[start:]])) is not None:
            return found
    last = turns[starts[-1] :]
    if system and last and (found := ids(last)) is not None:
        return found
    return _cut(last, ids) if last else None


def _cut(turns: list[Message], ids: Callable[[list[Message]], list[int] | None]) -> list[int] | None:
    """The last user's turn with as much of the end of its text as fits, and what follows it."""
    user, *rest = turns
    text, best = user["content"], None
    low, high = 1, len(text)  # characters to keep
    while low <= high:
        middle = (low + high) // 2
        found = ids([{**user, "content": text[-middle:]}, *rest])
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best
