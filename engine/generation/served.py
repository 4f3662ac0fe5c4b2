"""ServedGenerator: responses from an OpenAI-compatible server that holds the weights, in place of a `Generator`.

    settings = ServedSettings(base_url="http://127.0.0.1:8000/v1", server="vllm")
    ServedGenerator(settings, "my-model", tokenizer).generate(prompts, SamplingParams(max_new_tokens=64, seed=1))

Every setting of SamplingParams is sent, including defaults, because servers take missing ones from the model's
generation_config.json; a setting that the kind of server does not know raises an error. The server draws the noise:
each request carries a seed, but whether that makes the text reproducible depends on the server.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from macpo.engine.config import ServedSettings
from macpo.engine.connection import Connection, Unavailable
from macpo.engine.data.messages import Message
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, MacpoError, PeerError, Problem, Stopped
from macpo.engine.generation.params import SamplingParams, one_each
from macpo.engine.generation.request import FinishReason, Output, Request, Sample, content_ids, request_key, shortened
from macpo.engine.generation.response_text import decode
from macpo.engine.progress import Count, counted

POLL_S = 0.1
"""Seconds between two checks whether to stop while waiting for responses."""
_ALL = frozenset({"top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos"})
OPTIONS: dict[str, frozenset[str]] = {
    "vllm": _ALL,
    "sglang": _ALL,
    "transformers": _ALL - {"ignore_eos"},
    "openai": frozenset(),
}
"""SamplingParams that a kind of server takes beyond OpenAI's own (temperature, top_p, max_tokens, stop, seed)."""
_READS_TOKENS = ("vllm", "sglang")
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "stop"}


class ServedGenerator:
    """Implements `run` and `generate` of a `Generator` for a model that is served elsewhere.

    Args:
        settings: the server's address, its kind and how to call it.
        model: the server's name for the weights.
        tokenizer: the served model's tokenizer. `completions` needs it where the server reads text, not tokens. It also
            gives a response's token ids (the text, tokenised again) where the server sends none, and the server's count
            of the prompt's tokens is compared with ours.

    Outputs have no log-probs. A response that the server withholds (`content_filter`) is empty.

    Raises:
        ConfigError: a URL that cannot be used.
    """

    team = World()
    """Each rank calls the server by itself."""

    def __init__(self, settings: ServedSettings, model: str, tokenizer: Any = None) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.connection = Connection(
            settings.base_url, settings.api_key_env, settings.timeout_s, max_retries=settings.max_retries
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_ids: Sequence[str] | None = None,
        progress: Count | str | bool = False,
    ) -> list[Output]:
        """Draws `params.n` responses to every prompt: token ids for `completions`, dialogues for `chat`.

        Returns:
            One Output per prompt, in the order of `prompts`. Raises what `run` raises.
        """
        chat = self.settings.api == "chat"
        if request_ids is None:
            request_ids = content_ids(prompts, chat=chat)
        if len(request_ids) != len(prompts):
            raise ConfigError(f"{len(request_ids)} request ids for {len(prompts)} prompts", "give one per prompt")
        requests: list[Request] = []
        for id_, prompt, one in zip(request_ids, prompts, one_each(params, len(prompts)), strict=True):
            content: Any = tuple(prompt)
            ids, messages = ((), content) if chat else (content, ())
            requests.append(Request(id_, ids, one, tuple(range(one.n)), messages=messages))
        return self.run(requests, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Count | str | bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Output]:
        """Responds to all requests, with one call of the server per sample and `settings.concurrency` calls at a time.

        Raises:
            ConfigError, DataError: unsupported requests, before any work; a wrong key; another tokenizer.
            PeerError: no valid reply, even after `max_retries`. Stopped: asked to stop; calls in progress are dropped.
        """
        self.check(requests)
        jobs = [(request, sample) for request in requests for sample in request.samples]
        with counted(progress, len(jobs)) as count:
            samples = iter(_finished(self._all(jobs, count, should_stop or (lambda: False))))
        return [Output(request.id, [next(samples) for _ in request.samples]) for request in requests]

    def check(self, requests: Sequence[Request]) -> None:
        """Raises ConfigError or DataError for requests that this kind of server does not support; sends nothing."""
        server, chat = self.settings.server, self.settings.api == "chat"
        config = {problem for request in requests for problem in _unknown_options(request.params, server)}
        if not chat and server not in _READS_TOKENS and self.tokenizer is None:
            text = f"a {server} server is asked by text, and there is no tokenizer to write it"
            config.add(Problem(text, "give the served model's tokenizer, or use api: chat", field="served.api"))
        if any(request.adapter is not None for request in requests):
            fix = "a server's adapters are models: give that name"
            config.add(Problem("an adapter is named", fix, field="adapters"))
        if config:
            raise shortened(ConfigError, sorted(config, key=str))
        data: list[Problem] = []
        seen: Counter[tuple[str, int, int]] = Counter()
        for request in requests:
            name = f"request {request.id}"
            seen.update(keys := [(request.id, sample, request.attempt) for sample in request.samples])
            if any(seen[key] > 1 for key in keys):
                data.append(Problem("two requests have this id", "give every request an id of its own", field=name))
            if not (request.messages if chat else request.prompt_ids):
                what = "no dialogue" if chat else "no prompt"
                data.append(Problem(f"there is {what}", "api: chat takes messages, completions tokens", field=name))
            elif chat and (parts := {part for message in request.messages for part in message} - {"role", "content"}):
                text = f"the dialogue has {', '.join(sorted(parts))}, and api: chat is sent roles and texts alone"
                data.append(Problem(text, "use served.api: completions, or remove them from the data", field=name))
            elif not chat and server not in _READS_TOKENS and prompt_text(self.tokenizer, request.prompt_ids) is None:
                text = "no text is read as just the prompt's tokens: it is cut inside a word, or spells special tokens"
                fix = "drop long prompts (data.long_prompt: drop) and special text, or use a vllm or sglang server"
                data.append(Problem(text, fix, field=name))
        if data:
            raise shortened(DataError, data)

    async def _all(
        self, jobs: Sequence[tuple[Request, int]], count: Count, should_stop: Callable[[], bool]
    ) -> list[Sample]:
        """Samples in the order of the jobs; the first failure, or a stop, ends all calls in progress."""
        gate = asyncio.Semaphore(self.settings.concurrency)
        async with self.connection.async_client() as client:

            async def respond(request: Request, sample: int) -> Sample:
                async with gate:
                    return await self._one(client, request, sample)

            tasks = [asyncio.create_task(respond(*job)) for job in jobs]
            try:
                waiting = set(tasks)
                while waiting:
                    if should_stop():
                        raise Stopped("stopped while generating", "run the same command again")
                    done, waiting = await asyncio.wait(waiting, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        count(1, task.result().num_tokens)
                return [task.result() for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, client: Any, request: Request, sample: int) -> Sample:
        chat = self.settings.api == "chat"
        create = client.chat.completions.create if chat else client.completions.create
        try:
            return self._sample(await create(**self.body(request, sample)), request)
        except Exception as error:
            problem: Exception = error if isinstance(error, Unavailable) else self.connection.explained(error)
        if isinstance(problem, Unavailable):
            fix = "see that the server runs, then run the same command again: finished waves are kept"
            problem = PeerError(f"{self.settings.base_url}: {problem}", fix)
        if isinstance(problem, MacpoError):
            problem = type(problem)(problems=[replace(each, field="served") for each in problem.problems])
        raise problem from None

    def body(self, request: Request, sample: int) -> dict[str, Any]:
        """The arguments of the client's `create` for a sample."""
        params, server = request.params, self.settings.server
        seed = request_key(str(params.seed), request.purpose, request.id, str(sample), str(request.attempt))
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed % 2**31,
        }
        if params.stop:
            asked["stop"] = list(params.stop)
        if server in _READS_TOKENS:
            asked["extra_body"] = {
                "top_k": params.top_k or -1,
                "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty,
                "stop_token_ids": list(params.stop_token_ids),
                "ignore_eos": params.ignore_eos,
                "return_token_ids": True,
            }
        elif server == "transformers":  # its own options lack these, and whether to sample at all
            asked["extra_body"] = {"generation_config": json.dumps(_generation_config(params))}
        if self.settings.api == "chat":
            return {"messages": [dict(message) for message in request.messages], **asked}
        ids = list(request.prompt_ids)
        return {"prompt": ids if server in _READS_TOKENS else prompt_text(self.tokenizer, ids), **asked}

    def _sample(self, reply: Any, request: Request) -> Sample:
        """Raises Unavailable for a reply that is no completion, ConfigError where the server counts other tokens."""
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise Unavailable("the reply is no completion")
        choice, usage = choices[0], getattr(reply, "usage", None)
        text = getattr(choice, "text", None)
        if self.settings.api == "chat":  # a message without content is an empty response
            text = getattr(getattr(choice, "message", None), "content", None) or ""
        reason = getattr(choice, "finish_reason", None)
        if not isinstance(text, str) or reason not in _REASONS:
            raise Unavailable(f"the reply is no finished text (finish_reason {reason!r})")
        read = getattr(usage, "prompt_tokens", None)
        if read and request.prompt_ids and read != len(request.prompt_ids):
            ours = f"the agent's tokenizer and template make {len(request.prompt_ids)}"
            fix = "give the agent the served model's tokenizer (`model`) and template"
            raise ConfigError(f"the server reads request {request.id} as {read} tokens, {ours}", fix)
        ids = getattr(choice, "token_ids", None)
        if reason == "content_filter":
            text, ids = "", None
        elif reason == "stop":
            text, ids = self._without_end(text, ids, request.params)
        starts = [at for at in map(text.find, request.params.stop) if at >= 0]
        if starts:
            text, ids, reason = text[: min(starts)], None, "stop"
        counted = None
        if self.tokenizer is not None and ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif ids is None:
            counted = getattr(usage, "completion_tokens", None) or 0
        return Sample(list(ids or []), None, None, _REASONS[reason], text, counted=counted)

    def _without_end(self, text: str, ids: list[int] | None, params: SamplingParams) -> tuple[str, list[int] | None]:
        """Drops the token that ended a response; servers send it, as text too where it is not marked special."""
        if self.tokenizer is None:
            return text, ids
        if ids is not None:
            ends = {*self.tokenizer.all_special_ids, *params.stop_token_ids}
            ids = ids[:-1] if ids and ids[-1] in ends else ids
            return decode(self.tokenizer, ids), ids
        endings = [decode(self.tokenizer, [end]) for end in params.stop_token_ids]
        ending = next((end for end in endings if end and text.endswith(end)), "")
        return text.removesuffix(ending), None


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """Text that the tokenizer, adding special tokens as a server's does, reads as exactly these ids; None if none."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bare = text.removeprefix(tokenizer.bos_token or "")
    for candidate in (bare, bare.removeprefix(" "), text):
        if list(tokenizer(candidate)["input_ids"]) == list(ids):
            return str(candidate)
    return None


def _finished(work: Coroutine[Any, Any, list[Sample]]) -> list[Sample]:
    """Runs a coroutine to its result, even where an event loop is already running (in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _unknown_options(params: SamplingParams, server: str) -> Iterator[Problem]:
    for name in sorted(_ALL - OPTIONS[server]):
        value, off = getattr(params, name), SamplingParams.__dataclass_fields__[name].default
        if value != off:
            fix = f"set {name} to {off!r}, or say in served.server what answers there (vllm, sglang, transformers)"
            yield Problem(f"got {value!r}, and served.server: {server} knows no {name}", fix, field=f"sampling.{name}")


def _generation_config(params: SamplingParams) -> dict[str, Any]:
    """A complete GenerationConfig for `transformers serve`."""
    config: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "repetition_penalty": params.repetition_penalty,
        "do_sample": params.temperature > 0,
    }
    if params.temperature > 0:
        config |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        config |= {"min_p": params.min_p} if params.min_p else {}
    if params.stop_token_ids:
        config |= {"eos_token_id": list(params.stop_token_ids), "pad_token_id": params.stop_token_ids[0]}
    return config
