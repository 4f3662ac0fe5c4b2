"""Generator: many prompts in, sampled answers with log-probs out.

    Generator(model, tokenizer).generate(prompts, SamplingParams(max_new_tokens=64, seed=1))

A sampled text is a function of model, prompt, params, request id, sample and attempt: the noise is seeded by these,
never by the batch, the order or the number of processes (in float32, up to logit ties in the last bits).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.generation.batch_runner import BatchRunner
from macpo.engine.generation.equivalence import hooked_layers
from macpo.engine.generation.hf_runner import HfRunner
from macpo.engine.generation.model_facts import LayerShape, disabled, eos_ids, head_width, unwrap
from macpo.engine.generation.multilora import StackedAdapters, why_not
from macpo.engine.generation.params import SamplingParams, one_each
from macpo.engine.generation.pool.capacity import PoolPlan, bucket_of, graphs_why_not, plan_pool, pool_why_not
from macpo.engine.generation.pool.runner import PoolRunner
from macpo.engine.generation.pool.session import PoolSession
from macpo.engine.generation.request import Output, Request, Sample, check_requests, content_ids
from macpo.engine.generation.scheduler import Group, Need, Scheduler
from macpo.engine.generation.sequence import Row
from macpo.engine.generation.slots.cache import SlotCache
from macpo.engine.generation.slots.packed_linear import packed_linears
from macpo.engine.generation.slots.runner import SlotRunner
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.loading import embedding_rows
from macpo.engine.progress import Count, counted

_log = logging.getLogger(__name__)
CacheKind = Literal["pool", "slots"]


def _never() -> bool:
    return False


class Generator:
    """Batched generation for a Hugging Face causal LM, a peft model or a PolicyModule.

    Args:
        model: weights, on their device; put into eval mode while generating, restored afterwards.
        tokenizer: needed for stop texts and for `Sample.text`; ids beyond its length are never drawn.
        max_batch: sequences decoded together.
        max_cache_tokens: bound of the key-value cache in tokens; None: what `max_batch` of the longest request need.
        block_tokens: a sequence's share of the cache is rounded up to a multiple of this.
        cache: "pool" keeps keys and values in blocks that a request's samples share, and decodes by device work of
            fixed shape; "slots" keeps each sequence in a slot of its own, which is faster on a CPU. None: the pool on
            a GPU whose kernels take the model, else slots. The pool stays allocated between calls.
        use_graphs: whether decode steps over the pool are captured as CUDA graphs. None: where that is possible (one
            log line says why it is not on a GPU); True: an error where it is not.

    A policy that is split over a team of ranks (`split_policy`) is generated with by all of them together: each
    makes the same calls and gets the same outputs.

    Models that bypass transformers' attention interface are answered by their own `generate` (one log line says so).
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
        for name, value in (
            ("max_batch", max_batch),
            ("max_cache_tokens", max_cache_tokens),
            ("block_tokens", block_tokens),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"got {value}", f"{name} must be at least 1", field=f"generator.{name}")
        if cache not in (None, "pool", "slots"):
            raise ConfigError(f"got {cache!r}", "cache must be 'pool', 'slots' or None", field="generator.cache")
        if getattr(model, "collective", False):
            raise ConfigError("the policy is spread over ranks for training", "load it again to generate")
        self._outer, self.model = unwrap(model)
        self.team: World = getattr(model, "team", None) or World()
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_cache_tokens = max_cache_tokens
        self.block_tokens = block_tokens
        self.cache = cache
        self.use_graphs = use_graphs
        config = self.model.config.get_text_config()
        self.context_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.num_tokens = head_width(self.model) if tokenizer is None else min(head_width(self.model), len(tokenizer))
        self.eos_ids = eos_ids(self.model, tokenizer)
        self._layers: dict[int, LayerShape] | None = None
        self._probed: tuple[object, ...] = ()
        self._session: PoolSession | None = None
        self._said: set[str] = set()
        self._stack: StackedAdapters | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_ids: Sequence[str] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        progress: Count | str | bool = False,
    ) -> list[Output]:
        """Answers every prompt `params.n` times.

        Args:
            prompts: token ids, BOS and template included.
            params: one for all, or one a prompt.
            request_ids: what the noise is keyed by; default: hash of the prompt and the number of its occurrence.
            adapters: name of a loaded peft adapter, for all or one a prompt; None leaves the active one.
            progress: shows answers, tokens/s and time left, with this label where it is a text; or counts there.

        Returns:
            An Output a prompt, in the order of `prompts`.

        Raises:
            ConfigError, DataError: before any work, all bad requests at once.
            NumericsError: logits that are not finite.
        """
        ids = content_ids(prompts) if request_ids is None else list(request_ids)
        names = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        for what, values in (("request ids", ids), ("adapters", names)):
            if len(values) != len(prompts):
                raise ConfigError(f"{len(values)} {what} for {len(prompts)} prompts", "give one a prompt")
        requests = [
            Request(id_, tuple(prompt), one, tuple(range(one.n)), 0, name)
            for id_, prompt, one, name in zip(ids, prompts, one_each(params, len(prompts)), names, strict=True)
        ]
        return self.run(requests, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Count | str | bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Output]:
        """As `generate`, for requests that also choose samples and attempt; raises Stopped when asked to."""
        self.check(requests)
        found: dict[tuple[int, int], Sample] = {}
        steps, total = max(map(self._budget, requests), default=0), sum(len(r.samples) for r in requests)
        shown = progress if self.team.is_main else False
        with self._ready(), packed_linears(self._outer, steps), counted(shown, total) as count:

            def on_done(row: Row) -> None:
                found[row.index, row.sample] = row.finish(self.tokenizer)
                count(answers=1)

            stop = self.team.any_of(should_stop or _never)
            names = sorted({request.adapter for request in requests}, key=lambda name: (name is not None, name))
            stacked = self._stacked(names) if len(names) > 1 else None
            if stacked is not None:
                with stacked.active():
                    self._run(requests, list(range(len(requests))), on_done, count, stop, stacked)
                names = []
            for name in names:
                with self._adapter(name):
                    indices = [i for i, request in enumerate(requests) if request.adapter == name]
                    self._run(requests, indices, on_done, count, stop)
        return [Output(request.id, [found[i, s] for s in request.samples]) for i, request in enumerate(requests)]

    def _run(
        self,
        requests: Sequence[Request],
        indices: list[int],
        on_done: Callable[[Row], None],
        count: Count,
        should_stop: Callable[[], bool],
        adapters: StackedAdapters | None = None,
    ) -> None:
        """Requests, by their place in the list: of the active adapter, or of any that is stacked."""
        part = [requests[i] for i in indices]

        def make_row(group: Group, sample: int) -> Row:
            return self._row(indices[group.index], group.request, sample)

        layers = self._hooked_layers()
        if layers is None and self.team.size > 1:
            raise ConfigError("a model that bypasses the attention hook cannot be split", "use one that fits a rank")
        if layers is None:
            self._refuse_graphs("the model bypasses the attention hook")
            runner = HfRunner(self.model, self.max_batch, self.num_tokens, self.tokenizer, should_stop, count)
            runner.run([self._row(i, requests[i], sample) for i in indices for sample in requests[i].samples], on_done)
            return
        options: dict[str, Any] = {"make_row": make_row, "num_tokens": self.num_tokens, "tokenizer": self.tokenizer}
        options |= {"should_stop": should_stop, "adapters": adapters, "team": self.team, "count": count}
        with attention_hook(self.model):
            pool = self._uses_pool(layers)
            (self._pool_runner(part, layers, **options) if pool else self._slot_runner(part, **options)).run(on_done)

    def _slot_runner(self, part: Sequence[Request], **options: Any) -> BatchRunner:
        self._refuse_graphs("the cache is in slots")
        slot_tokens = max(self._reserved(request) for request in part)
        num_slots = min(self.max_batch, sum(len(request.samples) for request in part))
        if self.max_cache_tokens is not None:
            num_slots = min(num_slots, self.max_cache_tokens // slot_tokens)
        cache = SlotCache(num_slots, slot_tokens)
        return SlotRunner(cache, self.model, Scheduler(part, num_slots), **options)

    def _pool_runner(self, part: Sequence[Request], layers: Mapping[int, LayerShape], **options: Any) -> BatchRunner:
        plan = plan_pool(
            part, self._budget,
            num_stop_ids=max(len(self._stop_ids(request)) for request in part), num_tokens=self.num_tokens,
            block_tokens=self.block_tokens, max_batch=self.max_batch, max_cache_tokens=self.max_cache_tokens,
        )  # fmt: skip
        session = self._session_for(plan, layers)
        session.start(options["adapters"])
        self._capture(session, plan.num_slots)

        def need(request: Request) -> Need:
            return plan.needs[len(request.prompt_ids), self._budget(request)]

        scheduler = Scheduler(part, plan.num_slots, plan.num_blocks, need)
        return PoolRunner(session, plan.num_blocks, self.model, scheduler, **options)

    def _capture(self, session: PoolSession, num_slots: int) -> None:
        """Graphs for batches of up to `num_slots`, where they are wanted and possible."""
        if self.use_graphs is False:
            session.drop_graphs()
            return
        why = graphs_why_not(self.model, self.team)
        if not why:
            try:
                session.capture(num_slots, self._outer)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
        if why:
            self._refuse_graphs(why)
            if self.model.device.type == "cuda":
                self._say(f"decoding runs without CUDA graphs, which is slower: {why}")

    def _session_for(self, plan: PoolPlan, layers: Mapping[int, LayerShape]) -> PoolSession:
        """The kept session, or a new one that is at least as large."""
        kept, rows, blocks = self._session, bucket_of(plan.num_slots), plan.num_blocks
        if kept is None or not kept.serves(plan, layers):
            if kept is not None:
                rows, blocks = max(rows, kept.step.num_rows), max(blocks, kept.pool.num_blocks)
            kept = self._session = None  # its memory first
            kept = PoolSession(self.model, layers, self.block_tokens, rows, blocks, plan.shape, self.team)
        self._session = kept
        return kept

    def _uses_pool(self, layers: Mapping[int, LayerShape]) -> bool:
        if self.cache == "slots" or (self.cache is None and self.model.device.type != "cuda"):
            return False
        why = pool_why_not(layers, self.block_tokens, self.model.device)
        if why and self.cache == "pool":
            raise ConfigError(
                f"the block pool does not take {why}", "leave cache to its default", field="generator.cache"
            )
        if why:
            self._say(f"keys and values are kept in slots, which is slower: the block pool does not take {why}")
        return not why

    def _refuse_graphs(self, why: str) -> None:
        """Raises where the caller insists on graphs."""
        if self.use_graphs:
            raise ConfigError(f"no CUDA graphs: {why}", "leave use_graphs to its default", field="generator.use_graphs")

    def _say(self, text: str) -> None:
        """A log line, once a generator."""
        if text not in self._said:
            self._said.add(text)
            _log.warning("%s", text)

    def _hooked_layers(self) -> dict[int, LayerShape] | None:
        """What the layers cache; None where the model bypasses the hook. Asked again where its tensors have changed."""
        kind = (self.model.dtype, self.model.device)
        if self._probed != kind:
            self._layers = hooked_layers(self.model)
            self._probed = kind
        return self._layers

    def _stacked(self, names: Sequence[str | None]) -> StackedAdapters | None:
        """The adapters for one batch; None, with a log line, where they have to run one after the other."""
        outer: Any = self._outer
        reason = "the model bypasses the attention hook" if self._hooked_layers() is None else why_not(outer)
        if not reason and None in names and (len(outer.active_adapters) > 1 or disabled(outer)):
            reason = "several adapters are active at once, or they are switched off"
        if reason:
            _log.warning("adapters are run one after the other: %s", reason)
            return None
        own = [outer.active_adapter if name is None else name for name in names]
        kept = self._stack
        if kept is None or (kept.names, kept.labels) != (tuple(own), tuple(names)) or not kept.refresh():
            self._stack = StackedAdapters(outer, own, names)
        return self._stack

    def _row(self, index: int, request: Request, sample: int) -> Row:
        return Row(index, request, sample, self._budget(request), self._stop_ids(request))

    def _stop_ids(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self.eos_ids

    def _budget(self, request: Request) -> int:
        budget = request.params.max_new_tokens
        return budget if self.context_tokens is None else min(budget, self.context_tokens - len(request.prompt_ids))

    def _reserved(self, request: Request) -> int:
        """Cache tokens of the longest possible answer, in whole blocks."""
        blocks = -(-(len(request.prompt_ids) + self._budget(request)) // self.block_tokens)
        return blocks * self.block_tokens

    def check(self, requests: Sequence[Request]) -> None:
        """Raises ConfigError or DataError that names what is wrong with which requests; no work is done."""
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
        """Eval mode and no gradients; restores what was there."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """The named adapter active; restores the former one and what required gradients."""
        if name is None:
            yield
            return
        outer: Any = self._outer
        before, needs = outer.active_adapter, [p for p in outer.parameters() if p.requires_grad]
        outer.set_adapter(name)
        try:
            yield
        finally:
            outer.set_adapter(before)
            kept = set(map(id, needs))
            for parameter in outer.parameters():
                parameter.requires_grad_(id(parameter) in kept)
