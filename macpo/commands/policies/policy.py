"""One policy with all that it needs to write responses and to score them: weights, tokenizer, template, sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn, Self

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macpo.commands.policies.scores import Scored, score_pairs
from macpo.engine.config import SamplingSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Prompt
from macpo.engine.data.texts import Text, messages_of, prompt_list
from macpo.engine.errors import ConfigError, DataError, shown
from macpo.engine.generation import Generator, Output, SamplingParams
from macpo.engine.generation.text_prompts import ended_by, unframed
from macpo.engine.generation.vocabulary import check_vocab
from macpo.engine.models.policy import PolicyModule
from macpo.engine.progress import Count
from macpo.engine.scoring import ResponseScore
from macpo.method.encoding import encoded, limited_prompt
from macpo.method.policies import StageAgent


@dataclass(eq=False, repr=False)
class Policy:
    """A policy that writes and scores texts; `load_policy` opens one of a run, `Policy.of` wraps a model in memory.

    Prompts are strings (one user turn) or chat messages. They go through the policy's template, as the stages of a run
    read them; a dialogue of a run's policy that is too long loses its beginning.
    """

    name: str
    """Such as `student@2`."""
    module: PolicyModule
    chat: Chat
    """Tokenizer and template."""
    reading: StageAgent
    """How long prompts and responses may be."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How responses are drawn unless `generate` is told otherwise; a run's own."""
    seed: int = 0
    max_batch: int = 64

    @classmethod
    def of(
        cls,
        model: PolicyModule | PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | Chat,
        name: str = "",
    ) -> Self:
        """A model in memory, on its device, as a policy.

        Args:
            tokenizer: a tokenizer, or a `Chat` with another template than the tokenizer's own.
            name: default: the model's folder or Hub id.

        Raises:
            ConfigError: an architecture or template that cannot be used, or an embedding without a row for a token.
        """
        module = model if isinstance(model, PolicyModule) else PolicyModule(model)
        chat = tokenizer if isinstance(tokenizer, Chat) else Chat(tokenizer)
        check_vocab(module.base, chat.tokenizer)
        name = name or str(module.base.config.name_or_path) or "model"
        context_tokens = module.max_length or sys.maxsize
        reading = StageAgent(
            name=name,
            model=None,
            template="auto",
            eos_token=None,
            special_text="plain",
            context_tokens=context_tokens,
            max_prompt_tokens=context_tokens - 1,
            long_prompt="error",
            trust_remote_code=False,
        )
        return cls(name, module, chat, reading)

    def __repr__(self) -> str:
        return f"Policy({self.name!r})"

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The Hugging Face model, or peft's wrapper around it."""
        return self.module.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.tokenizer

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.module, self.chat, max_batch=self.max_batch)

    def generate(
        self, prompts: Text | Iterable[Text], *, progress: Count | str | bool = False, **sampling: Any
    ) -> list[Output]:
        """Responses to every prompt; `.text` of an output is the first, `.samples` are all.

        A response is a function of the policy, the prompt, the sampling and the seed; a prompt that comes twice in a
        call gets another one the second time.

        Args:
            prompts: one string or dialogue alone is one prompt.
            progress: whether to show responses, tokens/s and time left.
            sampling: fields of `SamplingParams` that differ from the policy's own, such as `temperature=0`, `n=4`,
                `max_new_tokens=64`, `seed=1`. A response ends at latest where the policy's context does.

        Raises:
            DataError: a prompt that the template does not write, or that leaves no room for a response.
            ConfigError: a value out of range. TypeError: no such field.
        """
        params = ended_by(replace(SamplingParams.of(self.sampling, seed=self.seed), **sampling), self.chat)
        ids, each = [], []
        for prompt in prompt_list(prompts):
            tokens = self._prompt_ids(_prompt(prompt))
            room = self.reading.context_tokens - len(tokens)
            ids.append(tokens)
            each.append(replace(params, max_new_tokens=min(params.max_new_tokens, room)))
        return unframed(self.generator.generate(ids, each, progress=progress), [self.chat] * len(ids))

    def score(
        self, pairs: Iterable[Scored], *, finished: bool | Iterable[bool] = True, max_tokens: int = 16384
    ) -> list[ResponseScore]:
        """How likely given responses are: `.sum_logp`, `.token_logps` (nats), `.num_tokens` and `.perplexity` of each.

        A text is scored as the stages of a run score it: after the same prompt tokens, cut where the policy's context
        ends. A prompt is computed once for all of its responses.

        Args:
            pairs: (prompt, response), texts or token ids.
            finished: whether responses that are texts ended by themselves, in all or one by one; their end token then
                counts too.
            max_tokens: token budget of one packed forward.

        Raises:
            DataError: an empty response, or what the template does not write.
            ValueError: another number of `finished` than of pairs.
        """
        return score_pairs(self.module, pairs, self._group, finished=finished, max_tokens=max_tokens)

    def _group(self, messages: list[Message], responses: list[tuple[str | Message, bool]]) -> PrefixGroup:
        found = encoded(self.chat, self.reading, Prompt.of(messages), responses)
        return found if found is not None else self._no_room()

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        found = limited_prompt(self.chat, self.reading, prompt)
        return found if found is not None else self._no_room()

    def _no_room(self) -> NoReturn:
        problem = f"not even the end of the message fits into {self.reading.max_prompt_tokens} tokens"
        raise DataError(problem, "write less, or begin a new dialogue", field=self.name)


def score(
    model: Policy | PolicyModule | PreTrainedModel | PeftModel,
    pairs: Iterable[Scored],
    *,
    tokenizer: PreTrainedTokenizerBase | Chat | None = None,
    finished: bool | Iterable[bool] = True,
    max_tokens: int = 16384,
) -> list[ResponseScore]:
    """How likely given responses are under a policy or any causal LM; see `Policy.score`.

    Args:
        model: a policy (`load_policy`), or a model on its device.
        pairs: (prompt, response), texts or token ids.
        tokenizer: needed for texts where `model` is no Policy; a `Chat` brings another template than its own.

    Raises:
        ConfigError: a text without a tokenizer.
    """
    if not isinstance(model, Policy) and tokenizer is None:
        return score_pairs(model, pairs, _no_texts, finished=finished, max_tokens=max_tokens)
    policy = model if isinstance(model, Policy) else Policy.of(model, tokenizer)  # type: ignore[arg-type]
    return policy.score(pairs, finished=finished, max_tokens=max_tokens)


def _no_texts(messages: list[Message], responses: list[tuple[str | Message, bool]]) -> NoReturn:
    raise ConfigError("a text needs a tokenizer", "give tokenizer=, or token ids", field="tokenizer")


def _prompt(prompt: Text) -> Prompt:
    messages = messages_of(prompt)
    if messages is None:
        raise DataError(f"got {shown(prompt)}", "a prompt is a string or chat messages", field="prompt")
    return Prompt.of(messages)
