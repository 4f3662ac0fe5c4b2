"""Scoring K candidates of every prompt: the log-prob of each candidate, beside padded forwards.

    python -m bench.bench_scoring [--shapes small|issue|gpu] [--only SUBSTRING] [--repeats 5] [--json-dir DIR]

Ours computes a prompt once for its K candidates, packs without padding and gives only the rows that predict a
candidate's token to the head. The padded peers run Hugging Face's forward over all prompt + candidate sequences sorted
by length, logits for the candidates' positions only (`logits_to_keep`), at several batch sizes; the best is the one to
compare with. Lengths are those of a committed file (`bench/inputs/requests.py`), weights random. Every log-prob is
checked against a float64 forward of each sequence alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import bench_generation
from bench.bench_generation import Shape, make_model
from bench.harness.measure import Case, Peer, head_ceiling
from bench.harness.options import Spec, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.requests import load
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.models.flops import ModelShape, counts_of_lengths, forward_flops
from macpo.engine.scoring import score

OURS = "macpo score"
CANDIDATES = 4

BATCHES = {"small": (4, 8), "issue": (4, 8, 16, 32), "gpu": (16, 32, 64)}
SHAPES = {
    shapes: [
        (name, replace(shape, batches=BATCHES[shapes]), dtype)
        for name, shape, dtype in cases
        if shape.requests != "hh-like-1024"
    ]
    for shapes, cases in bench_generation.SHAPES.items()
}
"""The models of the generation benchmark and its smaller files of requests; batch sizes of the padded peers."""


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [
        Spec(f"{name} {shape.requests} K={CANDIDATES}", partial(make_case, name, shape, dtype, device))
        for name, shape, dtype in SHAPES[shapes]
    ]


def make_groups(shape: Shape) -> list[PrefixGroup]:
    """Build the file's prompts, each with responses of its own and the next K - 1 requests' lengths."""
    requests = load(shape.requests, shape.vocab)
    responses = load(shape.requests, shape.vocab)[::-1]  # ids for the candidates: other prompts' tokens, repeated
    pool = [token for request in responses for token in request.prompt_ids]
    groups, at = [], 0
    for i, request in enumerate(requests):
        candidates = []
        for k in range(CANDIDATES):
            length = requests[(i + k) % len(requests)].new_tokens
            candidates.append([pool[(at + j) % len(pool)] for j in range(length)])
            at += length
        groups.append(PrefixGroup(request.prompt_ids, candidates))
    return groups


def make_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    model = make_model(shape, dtype, device)
    groups = make_groups(shape)
    size = ModelShape.of(model.config)
    lengths = [(len(group.prompt_ids), [len(response) for response in group.responses]) for group in groups]
    counts = counts_of_lengths(lengths)
    rows = torch.randn(1024, shape.hidden, dtype=dtype, device=device)
    return Case(
        f"{name} {shape.requests} K={CANDIDATES}",
        {**vars(shape), "tokens": counts.tokens, "rows": counts.rows},
        dtype,
        device,
        [
            Peer(OURS, partial(build_ours, model, groups)),
            *(Peer(f"padded forward, batches of {b}", partial(build_padded, model, groups, b)) for b in shape.batches),
        ],
        {"logps": exact(model, groups)},
        flop=forward_flops(size, counts),
        **head_ceiling(rows, model.get_output_embeddings().weight, ", head of 1,024 rows"),
        items=sum(len(p) + sum(r) for p, r in ((g.prompt_ids, map(len, g.responses)) for g in groups)),
    )


def build_ours(model: PreTrainedModel, groups: Sequence[PrefixGroup]) -> Run:
    max_tokens = 16384 if model.device.type == "cuda" else 4096

    def run() -> Outputs:
        scores = score(model, groups, max_tokens=max_tokens)
        return {"logps": torch.tensor([response.sum_logp for group in scores for response in group])}

    return run


def _sequences(groups: Sequence[PrefixGroup]) -> list[tuple[list[int], list[int]]]:
    return [(group.prompt_ids, response) for group in groups for response in group.responses]


def build_padded(model: PreTrainedModel, groups: Sequence[PrefixGroup], batch: int) -> Run:
    sequences = _sequences(groups)
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))

    def run() -> Outputs:
        out = torch.zeros(len(sequences))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            out[part] = _padded(model, [sequences[i] for i in part]).cpu()
        return {"logps": out}

    return run


@torch.no_grad()
def _padded(model: PreTrainedModel, part: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Return sums [B] in float32; sequences are padded on the left, so that the candidates end together."""
    longest = max(len(prompt) + len(response) for prompt, response in part)
    reply = max(len(response) for _, response in part)
    ids = torch.tensor([[0] * (longest - len(p) - len(r)) + p + r for p, r in part], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p) - len(r)) + [1] * (len(p) + len(r)) for p, r in part])
    mask = mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=reply + 1
    ).logits[:, :-1]
    targets = ids[:, -reply:]
    logps = logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    lengths = torch.tensor([len(r) for _, r in part], device=model.device)
    keep = torch.arange(reply, device=model.device) >= reply - lengths[:, None]
    return logps.masked_fill(~keep, 0.0).sum(1)


@torch.no_grad()
def exact(model: PreTrainedModel, groups: Sequence[PrefixGroup]) -> Tensor:
    """Return sums [sequences] in float64 from a float64 copy of the model, sequence by sequence. A large model, whose
    copy would not fit, computes in its own dtype with a float32 log-softmax."""
    large = sum(p.numel() for p in model.parameters()) > 10**8
    wide = model if large else copy.deepcopy(model).double()
    sums = []
    for prompt, response in _sequences(groups):
        ids = torch.tensor([prompt + response], device=model.device)
        logits: Tensor = wide(input_ids=ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1]
        logps = logits.to(torch.float32 if large else torch.float64).log_softmax(-1)
        sums.append(logps.gather(1, ids[0, -len(response) :, None]).sum())
    return torch.stack(sums).double().cpu()


if __name__ == "__main__":
    run_bench("scoring", specs, __doc__ or "")
