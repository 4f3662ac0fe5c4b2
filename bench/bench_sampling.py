"""Drawing one token a row from filtered logits, beside every peer.

    python -m bench.bench_sampling [--shapes small|issue|gpu] [--only SUBSTRING] [--json-dir DIR]
    pytest bench/bench_sampling.py --benchmark-json=FILE

Logits are text-like (bench/inputs/heads.py). Draws of different noise cannot be compared bit by bit, so: every drawn
token must lie in the reference's kept set; log-probs that a peer returns must be the reference's for its tokens; the
Hugging Face processors' whole distribution must be the reference's. Only ours returns both log-probs; the others'
time is without them. The floor is a copy that moves as many bytes as the logits have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness.measure import Case, Peer, copy_ceiling, imported, relative_errors
from bench.harness.options import Spec, bench_one, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.heads import head_inputs
from macpo.kernels import SampleParams, sample
from macpo.kernels.sampling import reference

OURS, OURS_TORCH, REFERENCE = "macpo sample", "macpo, torch backend", "torch reference (full sorts)"
HF, PLAIN = "HF processors + multinomial", "softmax + multinomial"
COMPILED, FLASHINFER = "torch.compile, exponential trick", "flashinfer"
PEERS = (OURS, OURS_TORCH, REFERENCE, HF, PLAIN, COMPILED, FLASHINFER)

SETTINGS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.95},
    "top-k50 top-p0.7": {"temperature": 0.95, "top_k": 50, "top_p": 0.7},
    "top-p0.9": {"temperature": 1.0, "top_p": 0.9},
    "min-p0.05": {"temperature": 1.0, "min_p": 0.05},
}
# Batch, vocabulary, names of settings.
SHAPES: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {
    "small": [(5, 97, ("temperature", "top-k50 top-p0.7"))],
    "issue": [(16, 32000, tuple(SETTINGS)), (64, 32000, ("top-k50 top-p0.7",))],
    "gpu": [(256, 128256, tuple(SETTINGS)), (32, 128256, ("top-k50 top-p0.7",))],
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [
        Spec(f"B{batch} V{vocab} {name}", partial(make_case, batch, vocab, name, device))
        for batch, vocab, names in SHAPES[shapes]
        for name in names
    ]


def make_case(batch: int, vocab: int, name: str, device: torch.device) -> Case:
    """Make float32 logits [B, V] and the set of tokens that may be drawn from them."""
    rows = batch + batch % 2
    made = head_inputs(rows, 256, vocab, "text", torch.float32, device, num_pairs=rows // 2)
    logits = (made.hidden.detach() @ made.weight.detach().T)[:batch].contiguous()
    setting = SETTINGS[name]
    params = SampleParams(7, **setting, batch=batch, device=device)  # type: ignore[arg-type]
    index = torch.arange(batch, device=device)
    keys = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=1)
    inputs = (logits, params, keys, index)
    num_bytes = float(logits.nbytes)
    peers = [
        Peer(OURS, partial(build_ours, inputs, None)),
        Peer(OURS_TORCH, partial(build_ours, inputs, "torch")),
        Peer(REFERENCE, lambda: lambda: named(reference.sample(*inputs))),
        Peer(HF, partial(build_hf, logits, setting), partial(hf_view, logits, setting)),
        # It has no filters.
        *([Peer(PLAIN, partial(build_plain, logits, setting))] if setting.keys() == {"temperature"} else []),
        Peer(COMPILED, partial(build_compiled, logits, setting)),
        Peer(FLASHINFER, partial(build_flashinfer, logits, setting)),
    ]
    return Case(
        f"B{batch} V{vocab} {name}",
        {"batch": batch, "vocab": vocab, **setting},
        torch.float32,
        device,
        peers,
        {},
        check=Check(logits, params),
        num_bytes=num_bytes,
        graph=True,
        **copy_ceiling(num_bytes, 2**21, device),
    )


class Check:
    """Computes the error of a peer's draws: infinite for a token outside the kept set, else its log-probs' error."""

    def __init__(self, logits: Tensor, params: SampleParams) -> None:
        """Compute the reference's kept set; at a nucleus' edge one rounding more or less is allowed."""
        self.logits = logits
        scores, keep = reference.scores_and_support(logits.double(), params)
        wider_p = (params.top_p + 1e-5).clamp(max=1.0)
        params_wider = SampleParams(params.seed, params.temperature, wider_p, params.top_k, params.min_p)
        self.allowed = keep | reference.scores_and_support(logits, params_wider)[1]
        self.processed = scores.double().masked_fill(~keep, float("-inf")).log_softmax(-1)
        self.raw = logits.double().log_softmax(-1)

    def __call__(self, outputs: Outputs) -> float:
        ids = outputs["ids"].long()[:, None]
        if not bool(self.allowed.gather(1, ids).all()):
            return float("inf")
        tables = {"raw": self.raw, "processed": self.processed}
        expected = {name: table.gather(1, ids).squeeze(1) for name, table in tables.items()}
        expected["probs"] = self.processed.exp()
        known = {name: values for name, values in expected.items() if name in outputs}
        return max(relative_errors(outputs, known).values(), default=0.0)


def named(drawn: tuple[Tensor, Tensor, Tensor]) -> Outputs:
    return dict(zip(("ids", "raw", "processed"), drawn, strict=True))


def build_ours(inputs: tuple[Tensor, SampleParams, Tensor, Tensor], backend: str | None) -> Run:
    return lambda: named(sample(*inputs, backend=backend))


def _processors(setting: dict[str, float]) -> Callable[[Tensor], Tensor]:
    """Return Hugging Face's filters in the order that `generate` applies them."""
    from transformers.generation import logits_process as hf

    warpers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    chain = hf.LogitsProcessorList(warper(setting[name]) for name, warper in warpers.items() if name in setting)
    no_ids = torch.zeros(1, 0, dtype=torch.int64)
    return lambda logits: chain(no_ids, logits)


def build_hf(logits: Tensor, setting: dict[str, float]) -> Run:
    process = _processors(setting)
    return lambda: {"ids": torch.multinomial(process(logits).softmax(-1), 1).squeeze(1)}


def hf_view(logits: Tensor, setting: dict[str, float], outputs: Outputs) -> Outputs:
    return {**outputs, "probs": _processors(setting)(logits).softmax(-1)}


def build_plain(logits: Tensor, setting: dict[str, float]) -> Run:
    return lambda: {"ids": torch.multinomial((logits / setting["temperature"]).softmax(-1), 1).squeeze(1)}


def _exponential(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Filter by one sort, then take the argmax of p / Exp(1) noise, which draws from p."""
    scores = logits / temperature
    if not top_k and top_p == 1.0:
        probs = scores.softmax(-1)
        if min_p:
            probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0.0, probs)
        return (probs / noise).argmax(-1)
    values, index = scores.topk(top_k, dim=-1) if top_k else scores.sort(dim=-1, descending=True)
    probs = values.softmax(-1)
    outside = probs.cumsum(-1) - probs >= top_p
    probs = torch.where(outside, 0.0, probs)
    drawn = (probs / noise[:, : probs.shape[1]]).argmax(-1, keepdim=True)
    return index.gather(1, drawn).squeeze(1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_exponential, dynamic=False)


def build_compiled(logits: Tensor, setting: dict[str, float]) -> Run:
    draw = _compiled()
    noise = torch.empty_like(logits)
    defaults: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    arguments = (defaults | setting).values()
    return lambda: {"ids": draw(logits, noise.exponential_(), *arguments)}


def build_flashinfer(logits: Tensor, setting: dict[str, float]) -> Run:
    sampling = imported("flashinfer", "sampling", "flashinfer does not import")

    def run() -> Outputs:
        scores = logits / setting["temperature"]
        if "top_k" in setting:
            ids = sampling.top_k_top_p_sampling_from_logits(
                scores, int(setting["top_k"]), setting["top_p"], filter_apply_order="top_k_first"
            )
        elif "top_p" in setting:
            ids = sampling.top_p_sampling_from_probs(scores.softmax(-1), setting["top_p"])
        elif "min_p" in setting:
            ids = sampling.min_p_sampling_from_probs(scores.softmax(-1), setting["min_p"])
        else:
            ids = sampling.sampling_from_logits(scores)
        return {"ids": ids}

    return run


test_sampling = bench_one

if __name__ == "__main__":
    run_bench("sampling", specs, __doc__ or "")
