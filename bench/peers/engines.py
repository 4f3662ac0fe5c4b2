"""Inference engines as peers of generation: CTranslate2, with the model's weights converted before the clock starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.harness.measure import Unavailable, imported
from bench.harness.timing import Outputs, Run
from bench.inputs.requests import GenerationRequest


def build_ctranslate2(
    folder: str, dtype: torch.dtype, device: torch.device, requests: Sequence[GenerationRequest]
) -> Run:
    """Greedy responses of each request's length by CTranslate2, all requests in one batch.

    Raises:
        Unavailable: it is not installed, or computes nothing in this dtype on this device.
    """
    generator_of = imported("ctranslate2", "Generator", "CTranslate2 is not installed")
    converter = imported("ctranslate2.converters", "TransformersConverter", "CTranslate2 has no converter")
    kinds = imported("ctranslate2", "get_supported_compute_types", "CTranslate2 does not name its dtypes")
    kind = str(dtype).removeprefix("torch.")
    if kind not in kinds(device.type):
        raise Unavailable(f"CTranslate2 computes nothing in {kind} on this {device.type}")
    lengths = {r.new_tokens for r in requests}
    if len(lengths) > 1:
        raise Unavailable("one call of CTranslate2 has one length for all responses")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.convert_ids_to_tokens(r.prompt_ids) for r in requests]
    never = len(tokenizer) - 1  # an end token that greedy responses do not hold
    with tempfile.TemporaryDirectory(prefix="macpo-ctranslate2-") as converted:
        converter(folder).convert(converted, quantization=kind, force=True)
        generator = generator_of(
            converted, device=device.type, compute_type=kind, intra_threads=torch.get_num_threads()
        )

    def run() -> Outputs:
        found = generator.generate_batch(
            prompts,
            max_length=max(lengths),
            sampling_topk=1,
            end_token=[never],
            include_prompt_in_result=False,
            max_batch_size=len(prompts),
        )
        return {str(i): torch.tensor(result.sequences_ids[0]) for i, result in enumerate(found)}

    return run
