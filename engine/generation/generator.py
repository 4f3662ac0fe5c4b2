"""Generator: many prompts in, sampled responses with log-probs out.

    Generator(model, tokenizer).generate(["What is rust ?"], SamplingParams(max_new_tokens=64, seed=1))[0].text

A sampled text is a function of model, prompt, params, request id, sample and attempt: these seed the noise, never the
batch, the order or the number of processes (in float32, up to logit ties in the last bits). The model of each token is
its own forward over the sequence so far. Where that takes other rotary factors beyond some length (LongRoPE), sequences
that reach it are prefilled again with what they have so far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from macpo.engine.data.chat import Chat
from macpo.engine.data.texts import Text
from macpo.engine.distributed.failures import is_out_of_memory, make_room
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, ResourceError
from macpo.engine.generation.batch_runner import BatchRunner, Job
from macpo.engine.generation.equivalence import verified_cache_shapes
from macpo.engine.generation.model_facts import CacheShape, disabled, eos_ids, head_width, unwrap
from macpo.engine.generation.multilora import StackedAdapters, active_adapter, why_not
from macpo.engine.generation.params import DEFAULT, SamplingParams
from macpo.engine.generation.pool.capacity import PoolPlan, bucket_of, graphs_why_not, plan_pool, pool_why_not
from macpo.engine.generation.pool.runner import PoolRunner
from macpo.engine.generation.pool.session import PoolSession
from macpo.engine.generation.request import Output, Request, Sample, check_requests, content_ids
from macpo.engine.generation.scheduler import Need, Scheduler
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.slots.cache import SlotCache
from macpo.engine.generation.slots.packed_linear import packed_linears
from macpo.engine.generation.slots.runner import SlotRunner
from macpo.engine.generation.text_prompts import tokenised, unframed
from macpo.engine.generation.vocabulary import Vocabulary
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.loading import embedding_rows
from macpo.engine.models.rotary import switch_length
from macpo.engine.models.tuning.adapter_rules import check_forward
from macpo.engine.progress import Count, counted

_log = logging.getLogger(__name__)
CacheKind = Literal["pool", "slots"]


class Generator:
    """Batched generation for a Hugging Face causal LM, a peft model or a PolicyModule.

    Args:
        model: the model with its weights on their device; it is in eval mode while generating and restored afterwards.
        tokenizer: a tokenizer, or a `Chat` with another template than the tokenizer's own. Needed for prompts and stop
            texts that are text, and for `Sample.text`; only ids that it has are drawn.
        max_batch: sequences decoded together; halved where memory runs out.
        max_cache_tokens: limit of the key-value cache in tokens; None: enough for `max_batch` of the longest requests.
        block_tokens: each sequence's share of the cache is rounded up to a multiple of this.
        cache: "pool" keeps keys and values in blocks that a request's samples share, and decodes by device work of
            fixed shape; "slots" keeps each sequence in a slot of its own, which is faster on a CPU. None: the pool on
            a GPU whose kernels take the model, else slots. The pool stays allocated between calls.
        use_graphs: whether decode steps over the pool are captured as CUDA graphs. None: where that is possible (on a
            GPU, one log line says why it is not); True: an error where it is not.

    The ranks of a tensor-parallel group (`split_policy`) generate together: each makes the same calls and gets the
    same outputs.

    Raises:
        ConfigError: an argument out of range, or a kind of adapter that is not supported. On first use: a model whose
            attention the hook cannot honour; the error names the architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_batch: int = 64,
        max_cache_tokens: int | None = None,
        block_tokens: int = 32,
        cache: CacheKind | None = None,
        use_graphs: bool | None = None,
    ) -> None:
        sizes = {"max_batch": max_batch, "max_cache_tokens": max_cache_tokens, "block_tokens": block_tokens}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(f"got {value}", f"{name} must be at least 1", field=f"generator.{name}")
        if cache not in (None, "pool", "slots"):
            raise ConfigError(f"got {cache!r}", "cache must be 'pool', 'slots' or None", field="generator.cache")
        if getattr(model, "collective", False):
            raise ConfigError("the policy is spread over ranks for training", "load it again to generate")
        self._outer, self.model = unwrap(model)
        check_forward(self._outer)
        self.team: World = getattr(model, "team", None) or World()
        self._chat = tokenizer if isinstance(tokenizer, Chat) else None
        self.tokenizer = tokenizer = tokenizer.tokenizer if isinstance(tokenizer, Chat) else tokenizer
        self.max_batch = max_batch
        self.max_cache_tokens = max_cache_tokens
        self.block_tokens = block_tokens
        self.cache = cache
        self.use_graphs = use_graphs
        config = self.model.config.get_text_config()
        self.context_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.switch_tokens = switch_length(self.model)
        self.vocabulary = Vocabulary.of(head_width(self.model), tokenizer)
        self.eos_ids = eos_ids(self.model, tokenizer)
        self._layers: dict[int, CacheShape] = {}
        self._probed: tuple[object, ...] = ()
        self._session: PoolSession | None = None
        self._logged: set[str] = set()
        self._stack: StackedAdapters | None = None

    def generate(
        self,
        prompts: Text | Iterable[Text | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT,
        *,
        request_ids: Sequence[str] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        progress: Count | str | bool = False,
    ) -> list[Output]:
        """Draws `params.n` responses to every prompt.

        Args:
            prompts: each a string (one user turn), chat messages, or token ids with BOS and template; one string or
                dialogue alone is one prompt. A text goes through the chat template, whose end tokens end its responses.
            params: one for all prompts, or one per prompt.
            request_ids: keys of the noise; default: hash of the prompt and the number of its occurrence.
            adapters: name of a loaded peft adapter, for all prompts or one per prompt; None keeps the active one.
            progress: whether to show responses, tokens/s and time left; a text is its label, a Count is called instead.

        Returns:
            One Output per prompt, in the order of `prompts`.

        Raises:
            ConfigError, DataError: bad requests, all at once, before any work; or an unsupported architecture.
            NumericsError: logits that are not finite.
            ResourceError: memory runs out even for one sequence, or on a rank of several.
        """
        given = tokenised(prompts, params, self._template)
        count = len(given.prompts)
        ids = content_ids(given.prompts) if request_ids is None else list(request_ids)
        names = [adapters] * count if adapters is None or isinstance(adapters, str) else list(adapters)
        for what, values in (("request ids", ids), ("adapters", names)):
            if len(values) != count:
                raise ConfigError(f"{len(values)} {what} for {count} prompts", "give one per prompt")
        requests = [
            Request(id_, tuple(prompt), one, tuple(range(one.n)), 0, name)
            for id_, prompt, one, name in zip(ids, given.prompts, given.params, names, strict=True)
        ]
        return unframed(self.run(requests, progress=progress), given.chats)

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Count | str | bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Output]:
        """Like `generate`, for requests that also choose samples and attempt; raises Stopped when asked to stop."""
        self.check(requests)
        if not requests:
            return []
        found: dict[tuple[str, int, int], Sample] = {}
        steps, total = max(map(self._limit, requests)), sum(len(r.samples) for r in requests)
        shown = progress if self.team.is_main else False
        with self._ready():
            self._cache_shapes()  # refuses a model before anything is packed, stacked or decoded
        with self._ready(), packed_linears(self._outer, steps), counted(shown, total) as count:

            def on_done(sequence: ActiveSequence) -> None:
                found[sequence.key] = sequence.finish(self.tokenizer)
                count(1)

            stop = self.team.any_of(should_stop or (lambda: False))
            job = Job(self.model, self.vocabulary, self.tokenizer, self._sequence, stop, count, self.team)
            names = sorted({request.adapter for request in requests}, key=lambda name: (name is not None, name))
            stacked = self._stacked(names) if len(names) > 1 or self._uses_pool() else None
            if stacked is not None:
                with stacked.active():
                    self._run_within_memory(requests, replace(job, adapters=stacked), on_done)
                names = []
            for name in names:
                with active_adapter(self._outer, name):
                    part = [request for request in requests if request.adapter == name]
                    self._run_within_memory(part, job, on_done)
        return [Output(r.id, [found[r.id, r.attempt, sample] for sample in r.samples]) for r in requests]

    def _run_within_memory(self, part: Sequence[Request], job: Job, on_done: Callable[[ActiveSequence], None]) -> None:
        """Runs the requests; where memory runs out, the unfinished ones again in smaller batches, from now on."""
        done: set[tuple[str, int, int]] = set()

        def take(sequence: ActiveSequence) -> None:
            done.add(sequence.key)
            on_done(sequence)

        while part:
            try:
                return self._run(part, job, take)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room(max(map(self._reserved, part)))
            left = [(r, tuple(s for s in r.samples if (r.id, r.attempt, s) not in done)) for r in part]
            part = [replace(request, samples=samples) for request, samples in left if samples]

    def _make_room(self, tokens: int) -> None:
        self._session = None
        if make_room() and self.team.size == 1:
            return  # models that nothing uses were dropped
        if self.max_batch == 1 or self.team.size > 1:  # the ranks of a team would have to fail together
            fix = "lower compute.generation_batch (max_batch of a Generator)" if self.max_batch > 1 else ""
            fix = fix or "lower sampling.max_new_tokens or context_tokens, or use a smaller model or dtype"
            what = f"decoding {self.max_batch} sequences of up to {tokens:,} tokens"
            raise ResourceError(f"{what} does not fit in memory", fix)
        self.max_batch //= 2
        _log.warning("memory ran out while decoding: %d sequences together (compute.generation_batch)", self.max_batch)

    def _run(self, part: Sequence[Request], job: Job, on_done: Callable[[ActiveSequence], None]) -> None:
        paused: dict[tuple[str, int, int], ActiveSequence] = {}  # at the length where the model's rotary factors switch

        def take(sequence: ActiveSequence) -> None:
            if len(sequence.tokens) == sequence.budget < self._limit(sequence.request) and not sequence.ended:
                paused[sequence.key] = sequence
            else:
                on_done(sequence)

        def resume(request: Request, sample: int) -> ActiveSequence:
            return paused[request.id, request.attempt, sample].resumed(request, self._budget(request))

        with attention_hook(self.model):
            self._runner(part, job).run(take)
            if paused:
                rest = [sequence.rest() for sequence in paused.values()]
                self._runner(rest, replace(job, make_sequence=resume)).run(on_done)

    def _runner(self, part: Sequence[Request], job: Job) -> BatchRunner:
        return self._pool_runner(part, job) if self._uses_pool() else self._slot_runner(part, job)

    def _slot_runner(self, part: Sequence[Request], job: Job) -> BatchRunner:
        self._refuse_graphs("the cache is in slots")
        slot_tokens = max(self._reserved(request) for request in part)
        num_slots = min(self.max_batch, sum(len(request.samples) for request in part))
        if self.max_cache_tokens is not None:
            num_slots = min(num_slots, self.max_cache_tokens // slot_tokens)
        return SlotRunner(SlotCache(num_slots, slot_tokens), Scheduler(part, num_slots), job)

    def _pool_runner(self, part: Sequence[Request], job: Job) -> BatchRunner:
        plan = plan_pool(
            part, self._budget,
            num_stop_ids=max(len(self._stop_ids(request)) for request in part), vocabulary=self.vocabulary,
            block_tokens=self.block_tokens, max_batch=self.max_batch, max_cache_tokens=self.max_cache_tokens,
        )  # fmt: skip
        session = self._session_for(plan)
        session.start(job.adapters)
        self._capture(session, plan.num_slots)

        def need(request: Request) -> Need:
            return plan.needs[len(request.prompt_ids), self._budget(request)]

        scheduler = Scheduler(part, plan.num_slots, plan.num_blocks, need)
        return PoolRunner(session, plan.num_blocks, scheduler, job)

    def _capture(self, session: PoolSession, num_slots: int) -> None:
        """Captures graphs for batches of up to `num_slots` where they are wanted and possible."""
        if self.use_graphs is False:
            session.drop_graphs()
            return
        why = graphs_why_not(self.model, self.team)
        if not why:
            try:
                session.capture(num_slots, self._outer)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                why = str(error).splitlines()[0]
        if why:
            self._refuse_graphs(why)
            if self.model.device.type == "cuda":
                self._warn_once(f"decoding runs without CUDA graphs, which is slower: {why}")

    def _session_for(self, plan: PoolPlan) -> PoolSession:
        """The kept session, or a new one that is at least as large."""
        layers = self._cache_shapes()
        kept, rows, blocks = self._session, bucket_of(plan.num_slots), plan.num_blocks
        if kept is None or not kept.serves(plan, layers):
            if kept is not None:
                rows, blocks = max(rows, kept.step.num_rows), max(blocks, kept.pool.num_blocks)
            kept = self._session = None  # its memory first
            kept = PoolSession(self.model, layers, self.block_tokens, rows, blocks, plan.shape, self.team)
        self._session = kept
        return kept

    def _uses_pool(self) -> bool:
        if self.cache == "slots" or (self.cache is None and self.model.device.type != "cuda"):
            return False
        why = pool_why_not(self._cache_shapes(), self.block_tokens, self.model.device)
        if why and self.cache == "pool":
            fix = "leave cache to its default"
            raise ConfigError(f"the block pool does not take {why}", fix, field="generator.cache")
        if why:
            self._warn_once(f"keys and values are kept in slots, which is slower: the block pool does not take {why}")
        return not why

    def _refuse_graphs(self, why: str) -> None:
        """Raises ConfigError where the caller insists on graphs."""
        if self.use_graphs:
            raise ConfigError(f"no CUDA graphs: {why}", "leave use_graphs to its default", field="generator.use_graphs")

    def _warn_once(self, text: str) -> None:
        """Logs a warning once per generator."""
        if text not in self._logged:
            self._logged.add(text)
            _log.warning("%s", text)

    def _cache_shapes(self) -> dict[int, CacheShape]:
        """What the layers cache; the model is checked again where its dtype or device has changed."""
        kind = (self.model.dtype, self.model.device)
        if self._probed != kind:
            self._layers = verified_cache_shapes(self.model)
            self._probed = kind
        return self._layers

    def _stacked(self, names: Sequence[str | None]) -> StackedAdapters | None:
        """The adapters stacked for one batch; None where they compute by themselves, of several one after the other."""
        outer: Any = self._outer
        reason = why_not(outer)
        if not reason and None in names and (len(outer.active_adapters) > 1 or disabled(outer)):
            reason = "several adapters are active at once, or they are switched off"
        if reason:
            if len(names) > 1:
                _log.warning("adapters are run one after the other: %s", reason)
            return None
        own = [outer.active_adapter if name is None else name for name in names]
        kept = self._stack
        if kept is None or (kept.names, kept.labels) != (tuple(own), tuple(names)) or not kept.refresh():
            self._stack = StackedAdapters(outer, own, names)
        return self._stack

    def _sequence(self, request: Request, sample: int) -> ActiveSequence:
        return ActiveSequence(request, sample, self._budget(request), self._stop_ids(request))

    def _template(self) -> Chat:
        """The template through which texts go."""
        if self.tokenizer is None:
            fix = "give the generator one, or prompts as token ids"
            raise ConfigError("a prompt that is a text needs a tokenizer", fix, field="generator.tokenizer")
        self._chat = self._chat or Chat(self.tokenizer)
        return self._chat

    def _stop_ids(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self.eos_ids

    def _limit(self, request: Request) -> int:
        """Most new tokens of each of a request's samples."""
        limit = request.params.max_new_tokens
        return limit if self.context_tokens is None else min(limit, self.context_tokens - len(request.prompt_ids))

    def _budget(self, request: Request) -> int:
        """Most new tokens that can follow on one prefill: cached keys keep the rotary factors that they were made with.

        The model's own forward of a longer sequence takes other factors from the first token on.
        """
        room = self.switch_tokens - len(request.prompt_ids) if self.switch_tokens is not None else -1
        return self._limit(request) if room < 0 else min(self._limit(request), room + 1)

    def _reserved(self, request: Request) -> int:
        """Cache tokens of prompt and longest possible response, in whole blocks."""
        blocks = -(-(len(request.prompt_ids) + self._limit(request)) // self.block_tokens)
        return blocks * self.block_tokens

    def check(self, requests: Sequence[Request]) -> None:
        """Raises a ConfigError or DataError that says what is wrong with which requests; no work is done."""
        check_requests(
            requests,
            vocabulary=embedding_rows(self.model),
            context_tokens=self.context_tokens,
            reserved=self._reserved,
            max_cache_tokens=self.max_cache_tokens,
            has_tokenizer=self.tokenizer is not None,
            adapters=set(getattr(self._outer, "peft_config", {})),
        )

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Sets eval mode and turns gradients off; restores the modules' modes."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
