"""Text to tokens, as an agent's policy reads it: prompts within their room, and shared-prefix groups."""

from __future__ import annotations

from collections.abc import Sequence

from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Pair, Prompt
from macpo.engine.errors import DataError
from macpo.method.policies import OpenPolicy
from macpo.method.refusals import about, is_refusal


def encode(
    policy: OpenPolicy, items: Sequence[tuple[Prompt, Sequence[tuple[str, bool]]]]
) -> tuple[list[PrefixGroup], list[int]]:
    """(prompt, responses) -> shared-prefix groups and the indices of the items that have one.

    A prompt keeps the room `max_prompt_tokens` whatever its responses are, so that a response is scored and trained
    after the very same prompt tokens.

    Raises:
        DataError: no item is left, or one that cannot be encoded, with its prompt.
    """
    agent, chat = policy.agent, policy.chat
    groups, kept, refused = [], [], 0
    for index, (prompt, responses) in enumerate(items):
        try:
            group = chat.group(
                prompt.messages,
                responses,
                max_tokens=agent.context_tokens,
                max_prompt_tokens=agent.max_prompt_tokens,
                long_prompt=agent.long_prompt,
            )
        except DataError as error:
            if agent.refused == "error" or not is_refusal(error):
                raise about(error, prompt) from error
            refused += 1
            continue
        if group is not None:
            groups.append(group)
            kept.append(index)
    if refused:
        policy.ctx.note(refused_by_template=refused)
        policy.ctx.log(f"{refused} of {len(items)} rows are refused by the chat template and dropped")
    if not groups:
        raise DataError(
            f"none of {len(items)} prompts is left: {refused} are refused by the chat template, the others longer than "
            f"the {agent.max_prompt_tokens} tokens that context_tokens ({agent.context_tokens}) leaves them"
            if refused
            else f"none of {len(items)} prompts is left: each is longer than the {agent.max_prompt_tokens} tokens that "
            f"context_tokens ({agent.context_tokens}) leaves it",
            "raise context_tokens, or set data.long_prompt to truncate",
            field=policy.ctx.name,
        )
    return groups, kept


def encode_pairs(policy: OpenPolicy, pairs: Sequence[Pair]) -> tuple[list[PrefixGroup], list[int]]:
    """Groups of prompt + [chosen, rejected], and the indices of the pairs that have one."""
    items = [(p.prompt, [(p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished)]) for p in pairs]
    return encode(policy, items)


def limited_prompt(policy: OpenPolicy, prompt: Prompt) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped."""
    agent = policy.agent
    try:
        return policy.chat.limited_prompt_ids(prompt.messages, agent.max_prompt_tokens, long_prompt=agent.long_prompt)
    except DataError as error:
        if agent.refused == "error" or not is_refusal(error):
            raise about(error, prompt) from error
        return None
