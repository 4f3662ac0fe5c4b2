"""Batched generation: prompts in, sampled responses with their log-probs out.

What is offered here is imported when it is first asked for: naming a setting of generation needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from macpo.engine.generation.generator import Generator
    from macpo.engine.generation.params import SamplingParams
    from macpo.engine.generation.request import Output, Request, Sample, request_key
    from macpo.engine.generation.served import ServedGenerator
    from macpo.engine.generation.split_model import split_policy
    from macpo.engine.generation.waves import generate_waves

__all__ = [
    "Generator",
    "Output",
    "Request",
    "Sample",
    "SamplingParams",
    "ServedGenerator",
    "generate_waves",
    "request_key",
    "split_policy",
]
_HOMES = {
    "Generator": "generator",
    "Output": "request",
    "Request": "request",
    "Sample": "request",
    "SamplingParams": "params",
    "ServedGenerator": "served",
    "generate_waves": "waves",
    "request_key": "request",
    "split_policy": "split_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
