"""Scorers of text as stages use them: a sequence classifier, a policy's implicit reward, the demo world's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from macpo import demo_world
from macpo.engine.config import ComputeSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Prompt
from macpo.engine.data.truncation import shortened
from macpo.engine.errors import ConfigError, DataError, MacpoError
from macpo.engine.model_folders import local_folder, num_parameters, weight_files
from macpo.engine.run.context import StageContext
from macpo.method.encoding import encoded, limited_prompt
from macpo.method.likelihoods import likelihoods
from macpo.method.policies import OpenPolicy, StageAgent, policy_ref

if TYPE_CHECKING:
    from macpo.engine.models.reward.classifier import Classifier


class Item(NamedTuple):
    """A response to be scored."""

    prompt: Prompt
    reply: str | Message
    finished: bool

    @property
    def is_empty(self) -> bool:
        return isinstance(self.reply, str) and not self.reply.strip()


class Score(NamedTuple):
    """A response's score, and its length in the scorer's own tokens, the end token with it."""

    score: float
    tokens: int


Scores = Callable[[Sequence[Item]], list[Score]]
"""Every rank calls it with the same items, and gets the scores of all of them."""


class Described(BaseModel):
    """Settings of a scorer that decide its scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassifierScorer(Described):
    """A Hugging Face sequence classifier."""

    kind: Literal["reward"] = "reward"
    model: str | None
    """Folder or Hub id; None where a stage of the run trained it."""
    label: str | None = None
    template: str
    dtype: str
    max_tokens: int | None = None
    batch_tokens: int = Field(16384, exclude=True)
    trust_remote_code: bool = False

    def open(self, ctx: StageContext, compute: ComputeSettings, trained: Path | None) -> Scores:
        """Load it; `trained`: its folder, where a stage of the run trained it."""
        from macpo.engine.models.compute import device_of, dtype_of, model_cache
        from macpo.engine.models.loading import as_dtype
        from macpo.engine.models.reward.classifier import load_classifier

        folder = str(trained or self.model)
        model_cache(compute, False).make_room(folder, 1)
        classifier = load_classifier(
            folder,
            dtype=dtype_of(compute) if self.dtype == "auto" else as_dtype(self.dtype),
            device=device_of(compute),
            label=self.label,
            trust_remote_code=self.trust_remote_code,
        )
        chat = scorer_chat(folder, self.template, trust_remote_code=self.trust_remote_code)
        reader = Reader.of(classifier, chat, self.max_tokens)

        def scores(items: Sequence[Item]) -> list[Score]:
            rows = [reader.ids(item) for item in items]
            found = classifier.shared_scores(
                rows, batch_tokens=self.batch_tokens, world=ctx.world, should_stop=ctx.stop_requested
            )
            return [Score(score, reader.length(item)) for score, item in zip(found, items, strict=True)]

        return scores

    def num_parameters(self) -> int:
        """How many weights a token goes through; 0 of a model that the run trains, or whose files are not here."""
        return _num_parameters(self.model)


def _num_parameters(model: str | None) -> int:
    try:
        return 0 if model is None else num_parameters(weight_files(local_folder(model)))
    except MacpoError:
        return 0


def scorer_chat(folder: str, template: str, *, trust_remote_code: bool = False) -> Chat:
    """A classifier's tokenizer and template.

    Raises:
        ConfigError: no tokenizer, or no template where `auto` is asked for: a guessed one would give wrong scores.
    """
    tokenizer = load_tokenizer(local_folder(folder, trust_remote_code=trust_remote_code))
    if template == "auto" and not tokenizer.chat_template:
        fix = "set template to the one that it was trained with: vicuna, chatml, plain or a jinja file"
        raise ConfigError("its tokenizer has no chat template", fix, file=folder, field="template")
    return Chat(tokenizer, template)


class Reader(NamedTuple):
    """How a classifier reads a dialogue with a response."""

    chat: Chat
    max_tokens: int | None
    until_end: bool
    """Whether it reads up to the response's end token, as reward models trained here do, not all that its template
    writes."""

    @classmethod
    def of(cls, classifier: Classifier, chat: Chat, max_tokens: int | None) -> Reader:
        """`max_tokens`: bound of the user's; the model's positions are one too."""
        from macpo.engine.models.reward.classifier import ENDING

        config = classifier.model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        bounds = [int(bound) for bound in (max_tokens, positions) if isinstance(bound, int) and bound > 0]
        return cls(chat, min(bounds, default=None), getattr(config, ENDING, None) == "eos")

    def ids(self, item: Item) -> list[int]:
        """Token ids of the dialogue with the response, shortened from its beginning where it is too long.

        An empty response is the prompt and the end token. One that did not end by itself has no end token for a model
        trained here; for another one its template decides.
        """
        messages, room = item.prompt.messages, self.max_tokens
        if self.until_end or item.is_empty:
            response = [self.chat.eos_id] if item.is_empty else self.chat.reply_ids(messages, item.reply, item.finished)
            whole = lambda turns: [*self.chat.prompt_ids(turns), *response]  # noqa: E731
        else:
            whole = lambda turns: self.chat.whole_ids(turns, item.reply)  # noqa: E731
        ids = whole(messages)
        if room is None or len(ids) <= room:
            return ids
        return shortened(messages, whole, room) or ids[:room]

    def length(self, item: Item) -> int:
        """Tokens of the response."""
        if item.is_empty:
            return 1
        return len(self.chat.reply_ids(item.prompt.messages, item.reply, item.finished))


class ImplicitScorer(Described):
    """beta (log p(response) under the policy - log p under its base): Rafailov et al., arXiv 2305.18290, equation 5
    without its prompt-only term, so scores compare responses to one prompt."""

    kind: Literal["implicit-reward"] = "implicit-reward"
    agent: StageAgent
    ready: str
    """Folder or Hub id of the policy."""
    beta: float
    dtype: str

    def open(self, ctx: StageContext, compute: ComputeSettings, trained: Path | None) -> Scores:
        base = str(self.agent.model)
        policy = OpenPolicy(ctx, self.agent, compute, base, policy_ref(base, self.ready))
        before = OpenPolicy(ctx, self.agent, compute, base, policy_ref(base, base))

        def scores(items: Sequence[Item]) -> list[Score]:
            groups = [self._group(policy.chat, item) for item in items]
            pairs = zip(likelihoods(policy, groups), likelihoods(before, groups), strict=True)
            return [Score(self.beta * (p[0].sum_logp - b[0].sum_logp), p[0].num_tokens) for p, b in pairs]

        return scores

    def _group(self, chat: Chat, item: Item) -> PrefixGroup:
        if item.is_empty:
            prompt = limited_prompt(chat, self.agent, item.prompt)
            group = None if prompt is None else PrefixGroup(prompt, [[chat.eos_id]])
        else:
            group = encoded(chat, self.agent, item.prompt, [(item.reply, item.finished)])
        if group is None:  # not even an empty turn fits
            limit = self.agent.max_prompt_tokens
            problem = f"prompt {item.prompt.id} does not fit into {limit} tokens"
            raise DataError(problem, "raise the scorer's max_tokens", field=self.agent.name)
        return group

    def num_parameters(self) -> int:
        return 2 * _num_parameters(self.agent.model)  # the policy, and its base


class GoldScorer(Described):
    """The exact rules of the demo world."""

    kind: Literal["gold"] = "gold"

    def open(self, ctx: StageContext, compute: ComputeSettings, trained: Path | None) -> Scores:
        def score(item: Item) -> Score:
            text = item.reply if isinstance(item.reply, str) else str(item.reply["content"])
            return Score(demo_world.gold(item.prompt.messages, text), len(text.split()))

        return lambda items: [score(item) for item in items]

    def num_parameters(self) -> int:
        return 0


Scorer = Annotated[ClassifierScorer | ImplicitScorer | GoldScorer, Field(discriminator="kind")]
