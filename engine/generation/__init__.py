"""Batched generation: prompts in, sampled responses with their log-probs out."""

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
