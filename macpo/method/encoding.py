"""Text to tokens, as an agent's policy reads it: prompts within their room, and shared-prefix groups."""

from __future__ import annotations

from collections.abc import Sequence

from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Message, Pair, Prompt
from macpo.engine.errors import DataError
from macpo.method.policies import OpenPolicy


def encode(
    policy: OpenPolicy, items: Sequence[tuple[Prompt, Sequence[tuple[str, bool]]]]
) -> tuple[list[PrefixGroup], list[int]]:
    """(prompt, responses) -> shared-prefix groups and the indices of the items that have one.

    A prompt keeps the room `max_prompt_tokens` whatever its responses are, so that a response is scored and trained
    after the very same prompt tokens.

    Raises:
        DataError: no item is left.
    """
    agent, chat = policy.agent, policy.chat
    groups, kept = [], []
    for index, (prompt, responses) in enumerate(items):
        group = chat.group(
            prompt.messages,
            responses,
            max_tokens=agent.context_tokens,
            max_prompt_tokens=agent.max_prompt_tokens,
            long_prompt=agent.long_prompt,
        )
        if group is not None:
            groups.append(group)
            kept.append(index)
    if not groups:
        raise DataError(
            f"none of {len(items)} prompts is left: each is longer than the {agent.max_prompt_tokens} tokens that "
            f"context_tokens ({agent.context_tokens}) leaves it",
            "raise context_tokens, or set data.long_prompt to truncate",
            field=policy.ctx.name,
        )
    return groups, kept


def encode_pairs(policy: OpenPolicy, pairs: Sequence[Pair]) -> tuple[list[PrefixGroup], list[int]]:
    """Groups of prompt + [chosen, rejected], and the indices of the pairs that have one."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    return encode(policy, items)


def limited_prompt(policy: OpenPolicy, messages: Sequence[Message]) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped."""
    agent = policy.agent
    return policy.chat.limited_prompt_ids(messages, agent.max_prompt_tokens, long_prompt=agent.long_prompt)
