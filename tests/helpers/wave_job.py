"""A wave job, for the tests that stop it, kill it or share it among ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import model_of
from generation_checks import character_tokenizer, some_prompts

from macpo.engine.generation import Generator, SamplingParams, generate_waves

PARAMS = SamplingParams(temperature=1.3, max_new_tokens=9, seed=7, stop_token_ids=tuple(range(3, 20)))


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """20 prompts in waves of 6; end tokens are likely, so that some responses are empty."""
    torch.set_num_threads(1)
    model = changes.pop("model", None) or model_of("llama")
    prompts = some_prompts([3 + i % 7 for i in range(20)])
    requests = [(f"p{i:02d}", prompt) for i, prompt in enumerate(prompts)]
    options: dict[str, Any] = {"wave_requests": 6, "purpose": "test"} | changes
    generator = Generator(model, character_tokenizer(61), max_batch=4)
    return generate_waves(
        generator, options.pop("requests", requests), options.pop("params", PARAMS), folder=folder, **options
    )
