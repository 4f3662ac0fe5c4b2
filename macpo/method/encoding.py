"""TODO."""

from __future__ import annotations

from collections.abc import Sequence

from macpo.engine.data.chat import Chat
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Message, Pair, Prompt
from macpo.engine.errors import DataError
from macpo.engine.run.context import StageContext
from macpo.method.policies import agent_chat


def encode(
    ctx: StageContext, chat: Chat, items: Sequence[tuple[Prompt, Sequence[tuple[str, bool]]]]
) -> tuple[list[PrefixGroup], list[int]]:
    """(prompt, answers) -> shared-prefix groups and the indices of the items that have one.

    A prompt keeps the room `max_prompt_tokens` whatever its answers are, so that an answer is scored and
    trained after the very same prompt tokens. Raises DataError (3) if no item is left.
    """
    agent = ctx.settings["agent"]
    groups, kept = [], []
    for index, (prompt, answers) in enumerate(items):
        group = chat.group(
            prompt.messages,
            answers,
            max_tokens=agent["context_tokens"],
            max_prompt_tokens=agent["max_prompt_tokens"],
            long_prompt=agent["long_prompt"],
        )
        if group is not None:
            groups.append(group)
            kept.append(index)
    if not groups:
        raise DataError(
            f"none of {len(items)} prompts is left: each is longer than the {agent['max_prompt_tokens']} tokens that "
            f"context_tokens ({agent['context_tokens']}) leaves it",
            "raise context_tokens, or set data.long_prompt to truncate",
            field=ctx.name,
        )
    return groups, kept


def encode_pairs(ctx: StageContext, pairs: Sequence[Pair]) -> tuple[list[PrefixGroup], list[int]]:
    """Groups of prompt + [chosen, rejected], and the indices of the pairs that have one."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    return encode(ctx, agent_chat(ctx), items)


def limited_prompt(ctx: StageContext, chat: Chat, messages: Sequence[Message]) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped."""
    agent = ctx.settings["agent"]
    return chat.limited_prompt_ids(messages, agent["max_prompt_tokens"], long_prompt=agent["long_prompt"])
