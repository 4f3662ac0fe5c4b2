"""A local judge: a causal LM whose verdict is the likelier of the tokens with which it would write [[A]] and [[B]].

The two verdicts, `[[A]]` and `[[B]]` as the model's template writes replies, are the same up to one token. That token
is a response of one token each, behind the question and what both have before it; `engine.scoring` computes a question
once for both. No reply is generated, so the judge gives no reasons, and every verdict can be computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from macpo.engine.config import ComputeSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.agree import on_main
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.generation.vocabulary import check_vocab
from macpo.engine.model_folders import PolicyRef, fingerprint_model, local_folder, refuse_adapter
from macpo.engine.models.compute import dtype_of, model_cache
from macpo.engine.models.parallelize import parallelize, spreads
from macpo.engine.models.policy import PolicyModule
from macpo.engine.progress import Count, uncounted
from macpo.engine.scoring import score
from macpo.judging.questions import Comparison, JudgePrompt
from macpo.judging.replies import Replies, key_of
from macpo.judging.settings import LocalJudge
from macpo.judging.verdicts import Judgement, Order, check_failures, equal

WAVE = 64
"""Questions whose log-probs are written together; the unit of resume."""


class VerdictModel:
    """The judge's model and the rule by which it reads questions; the weights are loaded when first needed.

    Args:
        settings: the judge's.
        compute: where it runs; its `dtype` is the judge's own.

    Raises:
        ConfigError: no such model, an adapter, or a template or tokenizer whose verdicts differ by more than a token.
    """

    def __init__(self, settings: LocalJudge, compute: ComputeSettings, *, trust_remote_code: bool = False) -> None:
        self.settings, self.trust_remote_code = settings, trust_remote_code
        self.compute = compute.model_copy(update={"dtype": settings.dtype})
        folder = local_folder(settings.model, trust_remote_code=trust_remote_code)
        refuse_adapter(folder)
        tokenizer = load_tokenizer(settings.model, trust_remote_code=trust_remote_code)
        self.chat = Chat(tokenizer, settings.template)
        self.lead_ids, self.verdict_ids = self._verdicts()
        self._policy: PolicyModule | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the log-probs besides the question: weights, tokenizer and template, dtype."""
        dtype = str(dtype_of(self.compute)).removeprefix("torch.")
        return {"weights": fingerprint_model(self.settings.model), "template": self.chat.digest, "dtype": dtype}

    def group(self, question: str) -> PrefixGroup:
        """The question with what both verdicts begin with, and the tokens of A and of B as two responses."""
        prompt = self.chat.prompt_ids([{"role": "user", "content": question}])
        return PrefixGroup(prompt + self.lead_ids, [[token] for token in self.verdict_ids])

    def logps(
        self, groups: Sequence[PrefixGroup], world: World, should_stop: Callable[[], bool] | None = None
    ) -> list[list[float]]:
        """Log-probs (nats) of A and of B for each group, float32 sums; all ranks get all. Raises Stopped."""
        policy = self.loaded(world)
        mine = score(policy, groups, max_tokens=self.compute.score_tokens, world=world, should_stop=should_stop)
        found = world.gather([[response.sum_logp for response in group] for group in mine])
        return [next(part for part in parts if part) for parts in zip(*found, strict=True)]

    def loaded(self, world: World) -> PolicyModule:
        """The judge's policy, spread over the ranks where one cannot hold it."""
        if self._policy is None:
            models, parallel = model_cache(self.compute, self.trust_remote_code), self.compute.parallel
            spread = not models.fits(self.settings.model) and spreads(parallel, world)
            policy = models.policy(PolicyRef(self.settings.model), spread=spread)
            check_vocab(policy.base, self.chat.tokenizer)
            self._policy = parallelize(policy, parallel, world) if spread else policy
        return self._policy

    def _verdicts(self) -> tuple[list[int], tuple[int, int]]:
        one, two = (self.chat.response_ids(f"[[{letter}]]", finished=False) for letter in "AB")
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
        if at is None or one[at + 1 :] != two[at + 1 :]:
            raise ConfigError(
                f"[[A]] and [[B]] differ by more than one token for {self.settings.model}: {one} and {two}",
                "use another model as a local judge, or serve this one and ask it in words (server: openai)",
                field=f"judges.{self.settings.name}",
            )
        return one[:at], (one[at], two[at])


@dataclass
class LogprobJudge:
    """Compares responses by the log-probs of a local model's verdict; the ranks of `world` share the questions.

    Args:
        model: the judge's model.
        prompt: the words of a question, ending with the verdict at once.
        replies: the open file of log-probs on rank 0; None on the others, and for a judge that is only planned.
        should_stop: asked before every forward.
    """

    model: VerdictModel
    prompt: JudgePrompt
    replies: Replies | None
    world: World = field(default_factory=World)
    should_stop: Callable[[], bool] | None = None
    count: Count = uncounted

    @property
    def about(self) -> dict[str, Any]:
        return {**self._identity, "margin": self.model.settings.margin}

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """Judge every comparison in both orders; log-probs that the file holds are not computed again. Collective.

        A question that is longer than the model's positions fails; nothing is cut from it, because what is cut could
        be the response. Raises JudgeError past the failure rate, Stopped where a stop is asked for.
        """
        both = [None if each.ours == each.theirs else self.prompt.questions(each) for each in comparisons]
        known = self._known([question for asked in both if asked is not None for question in asked])
        found = []
        for each, asked in zip(comparisons, both, strict=True):
            one, two = (self._order(question, known) for question in asked) if asked is not None else (None, None)
            found.append(equal(each) if one is None or two is None else Judgement(each, one, two))
        failed = sum(each.outcome == "failed" for each in found)
        path = self.replies.path if self.replies is not None else Path()
        check_failures(failed, len(found), len(found), self.model.settings.max_failure_rate, path)
        return found

    def keyed(self, comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
        """Key and text of every question."""
        asked = [
            question for each in comparisons if each.ours != each.theirs for question in self.prompt.questions(each)
        ]
        return [(self._key(question), question) for question in asked]

    @property
    def _identity(self) -> Mapping[str, Any]:
        return {**self.model.identity, "prompt_sha256": self.prompt.sha256}

    def _key(self, question: str) -> str:
        return key_of(self._identity, question)

    def _known(self, questions: list[str]) -> dict[str, dict[str, Any]]:
        """The row of every question, computed where it is not in the file yet."""
        keys = {question: self._key(question) for question in questions}
        rows: dict[str, dict[str, Any]] = on_main(self.world, lambda: self._kept(keys))
        todo = [question for question in keys if question not in rows]
        longest = self.model.loaded(self.world).max_length if todo else None
        for start in range(0, len(todo), WAVE):
            groups = {question: self.model.group(question) for question in todo[start : start + WAVE]}
            fitting = {q: g for q, g in groups.items() if longest is None or g.max_length <= longest}
            began = time.monotonic()
            logps = self.model.logps(list(fitting.values()), self.world, self.should_stop) if fitting else []
            seconds = round((time.monotonic() - began) / max(len(fitting), 1), 6)
            new = {
                question: {
                    "key": keys[question],
                    "logps": dict(zip("AB", both, strict=True)),
                    "tokens": [len(group.prompt_ids), 1],
                    "seconds": seconds,
                }
                for (question, group), both in zip(fitting.items(), logps, strict=True)
            }
            if self.replies is not None:
                long = [
                    {"key": keys[q], "error": f"the question has {g.max_length} tokens, {longest} fit"}
                    for q, g in groups.items()
                    if q not in fitting
                ]
                self.replies.add(*new.values(), *long)
            rows |= new
            self.count(len(groups), sum(group.num_tokens for group in fitting.values()))
        return rows

    def _kept(self, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        assert self.replies is not None  # rank 0 has it
        return {question: row for question, key in keys.items() if (row := self.replies.get(key)) is not None}

    def _order(self, question: str, rows: Mapping[str, dict[str, Any]]) -> Order:
        row = rows.get(question)
        if row is None:
            return Order("")
        ahead = row["logps"]["A"] - row["logps"]["B"]
        verdict = "C" if abs(ahead) <= self.model.settings.margin else "A" if ahead > 0 else "B"
        return Order(verdict, (row["key"],), tuple(row["tokens"]), row["seconds"])
