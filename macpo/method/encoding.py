"""Text to tokens, as an agent's policy reads it: prompts within their room, and shared-prefix groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Pair, Prompt, named
from macpo.engine.errors import DataError, TemplateRefusal
from macpo.method.policies import OpenPolicy, StageAgent

SIDES = ("chosen", "rejected")


class Encoded(NamedTuple):
    """Shared-prefix groups, the indices of the items that have one, and what became of the others and of responses."""

    groups: list[PrefixGroup]
    kept: list[int]
    counts: dict[str, int]
    """`dropped_long_prompt`; `dropped_refused`, by a template; `dropped_identical_when_cut`, pairs that context_tokens
    makes equal; `cut_SIDE`, responses that context_tokens cuts. Only the first also where it is zero."""


def encode(policy: OpenPolicy, items: Sequence[tuple[Prompt, Sequence[tuple[str | Message, bool]]]]) -> Encoded:
    """(prompt, responses) -> shared-prefix groups.

    A prompt keeps the room `max_prompt_tokens` whatever its responses are, so that a response is scored and trained
    after the very same prompt tokens.

    Raises:
        TemplateRefusal: the agent's template does not write a dialogue, and such rows are not to be dropped.
        DataError: no item is left. Both name the line of the data and the prompt where they are about one row.
    """
    agent, refused = policy.agent, 0
    groups, kept = [], []
    for index, (prompt, responses) in enumerate(items):
        try:
            group = encoded(policy.chat, agent, prompt, responses)
        except TemplateRefusal:
            if agent.refused == "error":
                raise
            refused += 1
            continue
        if group is not None:
            groups.append(group)
            kept.append(index)
    if not groups:
        long = f"longer than {agent.max_prompt_tokens} tokens, which is what the recipe leaves a prompt"
        why = f"each is {long}" if not refused else f"the chat template refuses {refused}, and each other is {long}"
        fix = "raise context_tokens (prompt_tokens, where it is set), or set data.long_prompt to truncate"
        raise DataError(
            f"none of {len(items)} prompts is left: {why}",
            f"{fix}, or use another template" if refused else fix,
            field=policy.ctx.name,
        )
    counts = {"dropped_long_prompt": len(items) - len(groups) - refused}
    return Encoded(groups, kept, counts | ({"dropped_refused": refused} if refused else {}))


def encoded(
    chat: Chat, agent: StageAgent, prompt: Prompt, responses: Sequence[tuple[str | Message, bool]]
) -> PrefixGroup | None:
    """The group of a prompt and its responses within an agent's room; None where the prompt is dropped."""
    try:
        return chat.group(
            prompt.messages,
            responses,
            max_tokens=agent.context_tokens,
            max_prompt_tokens=agent.max_prompt_tokens,
            long_prompt=agent.long_prompt,
        )
    except DataError as error:
        raise named(error, prompt) from None


def encode_examples(policy: OpenPolicy, examples: Sequence[Example]) -> Encoded:
    """Groups of prompt + [response]."""
    found = encode(policy, [(example.prompt, [(example.reply, example.finished)]) for example in examples])
    num_cut = sum(is_cut(policy.chat, found.groups[n], 0, examples[i].finished) for n, i in enumerate(found.kept))
    return found._replace(counts=found.counts | ({"cut_answers": num_cut} if num_cut else {}))


def encode_pairs(policy: OpenPolicy, pairs: Sequence[Pair]) -> Encoded:
    """Groups of prompt + [chosen, rejected]; pairs that differ only beyond context_tokens are dropped.

    Raises:
        DataError: no pair is left.
    """
    items = [(pair.prompt, pair_responses(pair)) for pair in pairs]
    found = encode(policy, items)
    groups, kept, counts = [], [], Counter(found.counts)
    for group, index in zip(found.groups, found.kept, strict=True):
        counts += cuts(policy.chat, group, pairs[index])
        if group.responses[0] == group.responses[1]:
            counts["dropped_identical_when_cut"] += 1
        else:
            groups.append(group)
            kept.append(index)
    if not groups:
        limit = policy.agent.context_tokens
        problem = f"none of {len(found.groups)} pairs is left: they differ only beyond context_tokens ({limit})"
        raise DataError(problem, "raise context_tokens", field=policy.ctx.name)
    return Encoded(groups, kept, {"dropped_long_prompt": 0, **counts})


def pair_responses(pair: Pair) -> list[tuple[str | Message, bool]]:
    """Both responses of a pair as a template gets them, and whether they ended by themselves."""
    return [(pair.reply("chosen"), pair.chosen_finished), (pair.reply("rejected"), pair.rejected_finished)]


def cuts(chat: Chat, group: PrefixGroup, pair: Pair) -> Counter[str]:
    """Which responses of a pair context_tokens cuts."""
    finished = (pair.chosen_finished, pair.rejected_finished)
    return Counter(f"cut_{side}" for n, side in enumerate(SIDES) if is_cut(chat, group, n, finished[n]))


def is_cut(chat: Chat, group: PrefixGroup, n: int, finished: bool) -> bool:
    """Whether a finished response lost its end; one that did not end by itself counts as whole."""
    return finished and group.responses[n][-1] != chat.eos_id


def limited_prompt(chat: Chat, agent: StageAgent, prompt: Prompt, reserved: int = 0) -> list[int] | None:
    """Token ids of a prompt within the room that the recipe leaves it; None where it is dropped.

    `reserved`: tokens of that room that are needed for something else.
    """
    room = agent.max_prompt_tokens - reserved
    try:
        return chat.limited_prompt_ids(prompt.messages, room, long_prompt=agent.long_prompt)
    except DataError as error:
        raise named(error, prompt) from None
