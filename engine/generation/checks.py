"""What is wrong with requests, said before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from macpo.engine.errors import ConfigError, DataError, MacpoError, Problem
from macpo.engine.generation.request import Request

MAX_PROBLEMS = 10
"""Bad requests that one error names."""


def check_requests(
    requests: Sequence[Request],
    *,
    vocabulary: int,
    context_tokens: int | None,
    reserved: Callable[[Request], int],
    max_cache_tokens: int | None,
    has_tokenizer: bool,
    adapters: Collection[str],
) -> None:
    """Raises ConfigError or DataError that names what is wrong with which requests.

    Args:
        vocabulary: token ids that the model can read.
        context_tokens: positions of the model; None: it has no bound.
        reserved: cache tokens that a request may take.
        adapters: names of those that are loaded.
    """
    data: list[Problem] = []
    config: list[Problem] = []
    seen: set[tuple[str, int, int]] = set()
    for request in requests:
        name, length = f"request {request.id}", len(request.prompt_ids)
        if not length:
            data.append(Problem("the prompt is empty", "give at least one token (BOS)", field=name))
        elif min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocabulary:
            data.append(
                Problem(f"a token id is outside the model's [0, {vocabulary})", "use the model's tokenizer", field=name)
            )
        elif context_tokens is not None and length >= context_tokens:
            text = f"the prompt has {length} tokens, the model's context {context_tokens}"
            data.append(Problem(text, "shorten the prompt", field=name))
        elif max_cache_tokens is not None and reserved(request) > max_cache_tokens:
            text = f"prompt and answer may take {reserved(request)} tokens, the cache {max_cache_tokens}"
            data.append(Problem(text, "raise max_cache_tokens or lower max_new_tokens", field=name))
        for sample in request.samples:
            if (key := (request.id, sample, request.attempt)) in seen:
                data.append(Problem("two requests have this id", "give every request an id of its own", field=name))
            seen.add(key)
        if request.params.stop and not has_tokenizer:
            config.append(Problem("stop texts need a tokenizer", "give one, or use stop_token_ids", field=name))
        if request.adapter is not None and request.adapter not in adapters:
            text = f"unknown adapter {request.adapter!r}; loaded: {', '.join(sorted(adapters)) or 'none'}"
            config.append(Problem(text, "load it first, or correct the name", field=name))
    for kind, problems in ((ConfigError, config), (DataError, data)):
        if problems:
            raise shortened(kind, problems)


def shortened(kind: type[MacpoError], problems: list[Problem]) -> MacpoError:
    """An error that names the first few problems, and how many more there are."""
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(Problem(f"and {len(problems) - len(shown)} more like these"))
    return kind(problems=shown)
