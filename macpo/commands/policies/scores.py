"""Scores of given responses, each beside its prompt as texts or as token ids; a prompt is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from macpo.engine import scoring
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import Message
from macpo.engine.data.records import prompt_id
from macpo.engine.data.texts import Text, messages_of
from macpo.engine.errors import DataError, shown
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import ResponseScore

Scored: TypeAlias = tuple[Text, str | Message] | tuple[Sequence[int], Sequence[int]]
"""A prompt (a string, which is one user turn, or chat messages) and its response (its text, or an assistant's message
with further parts); or the token ids of both, end token included."""
Grouping: TypeAlias = Callable[[list[Message], list[tuple[str | Message, bool]]], PrefixGroup]
"""A dialogue and its responses (text or message, finished) -> token ids."""


def score_pairs(
    model: PolicyModule | PreTrainedModel | PeftModel,
    pairs: Iterable[Scored],
    group: Grouping,
    *,
    finished: bool | Iterable[bool],
    max_tokens: int,
) -> list[ResponseScore]:
    """One score a pair, in their order.

    Args:
        group: makes token ids of texts.
        finished: whether responses that are texts ended by themselves, in all or one by one.
        max_tokens: token budget of one packed forward.

    Raises:
        DataError: what cannot be tokenised or scored. ValueError: another number of `finished` than of pairs.
    """
    given = list(pairs)
    ended = [finished] * len(given) if isinstance(finished, bool) else [bool(each) for each in finished]
    if len(ended) != len(given):
        raise ValueError(f"{len(ended)} values of finished for {len(given)} pairs")
    by_prompt: dict[object, list[int]] = {}
    for index, (prompt, _) in enumerate(given):
        messages = messages_of(prompt)
        key = tuple(prompt) if messages is None else prompt_id(messages)
        by_prompt.setdefault(key, []).append(index)
    groups = [_group([given[i] for i in same], [ended[i] for i in same], group) for same in by_prompt.values()]
    found: dict[int, ResponseScore] = {}
    for same, scores in zip(by_prompt.values(), scoring.score(model, groups, max_tokens=max_tokens), strict=True):
        found.update(zip(same, scores, strict=True))
    return [found[index] for index in range(len(given))]


def _group(pairs: Sequence[Scored], ended: Sequence[bool], group: Grouping) -> PrefixGroup:
    """The token ids of responses to one prompt."""
    prompt = pairs[0][0]
    messages = messages_of(prompt)
    if messages is None:
        return PrefixGroup(list(prompt), [list(response) for _, response in pairs])  # type: ignore[arg-type]
    responses: list[tuple[str | Message, bool]] = []
    for (_, response), end in zip(pairs, ended, strict=True):
        if not isinstance(response, str | Mapping):
            raise DataError(f"got {shown(response)}", "the response to a text is a text", field="response")
        responses.append((response, end))
    return group(messages, responses)
