"""Generation beside Hugging Face's: many prompts, a response of its own length each, greedy, end tokens ignored.

    python -m bench.bench_generation [--shapes small|issue|gpu] [--only SUBSTRING] [--repeats 5] [--json-dir DIR]
    python -m bench.bench_generation --model FOLDER [--dtype bfloat16]     a pretrained model, beside CTranslate2 too

All respond to the requests of a committed file (`bench/inputs/requests.py`) with the same random weights. `generate`
runs static batches of prompts sorted by length, at several batch sizes, each until its longest response is done; its
best size is the one to compare with. `generate_batch` is transformers' continuous batching, told each request's length.
Useful tokens are those that a request asked for. Every response is checked: each of its tokens must have the largest
logit of a teacher-forced forward, up to a tie.

`macpo Generator` takes the path of its default (on a GPU the block pool with CUDA graphs, on a CPU slots); its other
paths are peers, so `--peers slots` or `--peers pool` compares them. Below the table stands each one's share of the
decode floor (`bench/peers/decode_floor.py`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from bench.harness.measure import SHORT, Case, Peer, Unavailable, head_ceiling
from bench.harness.options import Spec, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.requests import GenerationRequest, load
from bench.peers.decode_floor import decode_floor
from bench.peers.engines import build_ctranslate2
from macpo.engine.config import ParallelSettings
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.flops import ModelShape, counts_of_lengths, forward_flops
from macpo.engine.models.liger import use_liger
from macpo.engine.models.model_cache import shared_copy

OURS = "macpo Generator"
MAX_BATCH = 256
"""Responses that ours decodes at once."""
REAL = (32, 100, 64)
"""Requests of a pretrained model: how many, tokens of a prompt, tokens of a response."""
CHECK_TOKENS = 16384
"""Tokens of a forward that checks responses, padding included."""
TIE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest gap to the best logit that a greedy token may have; in bfloat16 logits near 16 are 0.06 to 0.12 apart."""


@dataclass(frozen=True)
class Shape:
    """A Llama and the requests that it answers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    requests: str
    batches: tuple[int, ...]
    """Static batch sizes of `generate`."""
    tied: bool = True

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )


LLAMA_1B = Shape(2048, 16, 32, 8, 8192, 128256, "", (64, 128, 256))
LLAMA_8B = Shape(4096, 32, 32, 8, 14336, 128256, "", (64, 128, 256), False)
SHAPES: dict[str, list[tuple[str, Shape, torch.dtype]]] = {
    "small": [("Llama 0.1M", Shape(32, 2, 4, 2, 64, 512, "hh-like-8", (4, 8)), torch.float32)],
    "issue": [("Llama 15M", Shape(288, 6, 6, 6, 768, 32000, "hh-like-64", (8, 16, 32, 64)), torch.float32)],
    "gpu": [
        (name, replace(shape, requests=requests), torch.bfloat16)
        for requests in ("hh-like-1024", "hh-like-256")  # many rows at once; and few enough for static batches
        for name, shape in (("Llama 1B", LLAMA_1B), ("Llama 8B", LLAMA_8B))
    ],
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [
        Spec(f"{name} {shape.requests}", partial(make_case, name, shape, dtype, device))
        for name, shape, dtype in SHAPES[shapes]
    ]


def pretrained(folder: str, dtype: torch.dtype, device: torch.device) -> Spec:
    return Spec(f"{Path(folder).name} {SHORT[dtype]}", partial(make_real, folder, dtype, device))


@functools.lru_cache(maxsize=1)
def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a model with random weights, spread so that greedy tokens are not ties."""
    torch.manual_seed(20261122)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config()).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    return model.requires_grad_(False)


def make_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    model = make_model(shape, dtype, device)
    return case_of(f"{name} {shape.requests}", vars(shape), model, load(shape.requests, shape.vocab), shape.batches)


def make_real(folder: str, dtype: torch.dtype, device: torch.device) -> Case:
    """A pretrained model and `REAL` requests; engines that read its folder take part."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()  # type: ignore[arg-type]
    model.requires_grad_(False)
    number, prompt_tokens, new_tokens = REAL
    draw = random.Random("requests of a pretrained model")
    first, vocab = 100, model.get_input_embeddings().weight.shape[0]  # special tokens lie at the beginning
    requests = [
        GenerationRequest([draw.randrange(first, vocab) for _ in range(prompt_tokens)], new_tokens)
        for _ in range(number)
    ]
    about = {"model": Path(folder).name, "requests": number, "prompt": prompt_tokens, "new": new_tokens}
    case = case_of(f"{Path(folder).name} {SHORT[dtype]}", about, model, requests, (8, 16, 32))
    engine = Peer("CTranslate2", partial(build_ctranslate2, folder, dtype, device, requests))
    return replace(case, peers=[*case.peers, engine])


def case_of(
    name: str,
    about: dict[str, Any],
    model: PreTrainedModel,
    requests: Sequence[GenerationRequest],
    batches: Sequence[int],
) -> Case:
    """The case of a model that responds to requests; `batches`: static batch sizes that `generate` tries."""
    dtype, device = model.dtype, model.device
    useful = sum(request.new_tokens for request in requests)
    size = ModelShape.of(model.config)
    # The last token of a response is not fed again.
    counts = counts_of_lengths([(len(r.prompt_ids), [r.new_tokens - 1]) for r in requests])
    step = torch.randn(min(MAX_BATCH, len(requests)), model.config.hidden_size, dtype=dtype, device=device)
    peers = [
        Peer(OURS, partial(build_ours, model, requests)),
        *(Peer(f"{OURS}, {path}", partial(build_ours, model, requests, **options)) for path, options in paths(device)),
        *(Peer(f"generate, batches of {b}", partial(build_generate, model, requests, b)) for b in batches),
        *(
            Peer(f"generate, static cache, compiled, {b}", partial(build_static, model, requests, b))
            for b in batches[-1:]
        ),
        Peer("generate_batch", partial(build_continuous, model, requests)),
    ]
    floor = decode_floor(model, requests, MAX_BATCH)
    return Case(
        name,
        {**about, "useful_tokens": useful, "prompt_tokens": sum(len(r.prompt_ids) for r in requests)},
        dtype,
        device,
        peers,
        {},
        check=partial(greedy_gap, model, requests, dtype),
        flop=forward_flops(size, counts),
        **head_ceiling(step, model.get_output_embeddings().weight, ", head of one decode step"),
        traced=False,
        items=useful,
        floor_ms=floor.total_ms,
        floor_name=str(floor),
    )


def paths(device: torch.device) -> list[tuple[str, dict[str, Any]]]:
    """Return our paths besides the default one, with the generator's options."""
    pool: dict[str, Any] = {"cache": "pool", "use_graphs": False}
    if device.type == "cuda":
        return [("pool without graphs", pool), ("slots", {"cache": "slots"})]
    return [("pool", pool)]


def as_outputs(responses: Sequence[Sequence[int]]) -> Outputs:
    return {str(i): torch.tensor(response) for i, response in enumerate(responses)}


def build_ours(model: PreTrainedModel, requests: Sequence[GenerationRequest], **options: Any) -> Run:
    params = [SamplingParams(temperature=0, max_new_tokens=r.new_tokens, ignore_eos=True) for r in requests]
    own = shared_copy(model)  # the others keep the family's modules
    use_liger(own, ParallelSettings(), model.device)
    generator = Generator(own, max_batch=min(MAX_BATCH, len(requests)), **options)

    def run() -> Outputs:
        outputs = generator.generate([r.prompt_ids for r in requests], params)
        return as_outputs([output.samples[0].token_ids for output in outputs])

    return run


def build_generate(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], batch: int, cache: str | None = None
) -> Run:
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))

    def run() -> Outputs:
        responses: list[list[int]] = [[] for _ in requests]
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            for i, response in zip(part, _static_batch(model, [requests[i] for i in part], cache), strict=True):
                responses[i] = response
        return as_outputs(responses)

    return run


def _static_batch(model: PreTrainedModel, part: Sequence[GenerationRequest], cache: str | None) -> list[list[int]]:
    longest = max(len(r.prompt_ids) for r in part)
    ids = torch.tensor([[0] * (longest - len(r.prompt_ids)) + r.prompt_ids for r in part])
    mask = torch.tensor([[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in part])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(r.new_tokens for r in part),
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
    )
    with torch.no_grad():
        out: Any = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    return [row[longest : longest + r.new_tokens] for row, r in zip(out.tolist(), part, strict=True)]


def build_static(model: PreTrainedModel, requests: Sequence[GenerationRequest], batch: int) -> Run:
    if model.device.type != "cuda":
        raise Unavailable("compiled with a static cache it is timed on GPUs only")
    return build_generate(model, requests, batch, "static")


def build_continuous(model: PreTrainedModel, requests: Sequence[GenerationRequest]) -> Run:
    if not hasattr(model, "continuous_batching_context_manager"):
        raise Unavailable("this transformers has no continuous batching")
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
    # Its cache as large as the requests need: by default it takes most of the machine's memory, and on a CPU the time
    # to touch that. A block is 256 tokens.
    blocks = sum(-(-(len(r.prompt_ids) + r.new_tokens) // 256) for r in requests)
    sizes = ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=max(512, len(requests)))

    def run() -> Outputs:
        before = model.config._attn_implementation
        responses: dict[str, list[int]] = {}
        try:
            with model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=sizes, block=True
            ) as manager:
                for i, r in enumerate(requests):
                    manager.add_request(r.prompt_ids, request_id=str(i), max_new_tokens=r.new_tokens)
                while len(responses) < len(requests):
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        responses[result.request_id] = list(result.generated_tokens)
                    elif result is None and not manager.is_running():
                        raise RuntimeError("its thread ended before all requests were answered")
        finally:
            model.set_attn_implementation(before)
        return as_outputs([responses[str(i)] for i in range(len(requests))])

    return run


@torch.no_grad()
def greedy_gap(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], dtype: torch.dtype, outputs: Outputs
) -> float:
    """Return 0 if every token is greedy up to a tie, else infinity (also for a response of another length)."""
    responses = [outputs[str(i)].tolist() for i in range(len(requests))]
    if any(len(response) != r.new_tokens for response, r in zip(responses, requests, strict=True)):
        return float("inf")
    backbone: Any = model.base_model
    head: Any = model.get_output_embeddings()
    wholes = [r.prompt_ids + response[:-1] for response, r in zip(responses, requests, strict=True)]
    order, worst = sorted(range(len(wholes)), key=lambda i: len(wholes[i]), reverse=True), 0.0
    while order:
        count = max(1, CHECK_TOKENS // len(wholes[order[0]]))
        part, order = order[:count], order[count:]
        width = len(wholes[part[0]])  # padded on the right, where nothing before sees it
        ids = torch.tensor([wholes[i] + [0] * (width - len(wholes[i])) for i in part], device=model.device)
        states: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        rows = torch.cat([states[k, len(requests[i].prompt_ids) - 1 : len(wholes[i])] for k, i in enumerate(part)])
        logits = head(rows).float()
        chosen = torch.tensor([token for i in part for token in responses[i]], device=model.device)
        gap = logits.max(dim=1).values - logits.gather(1, chosen[:, None])[:, 0]
        worst = max(worst, float(gap.max()))
    return 0.0 if worst <= TIE[dtype] else float("inf")


if __name__ == "__main__":
    run_bench("generation", specs, __doc__ or "", pretrained=pretrained)
