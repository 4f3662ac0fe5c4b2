"""Attention over prompts that responses share, forward and backward, beside every peer.

    python -m bench.bench_prefix_attention [--shapes small|issue|gpu] [--only SUBSTRING] [--json-dir DIR]
    pytest bench/bench_prefix_attention.py --benchmark-json=FILE

FlexAttention and ours take the packed row; FlexAttention's block mask is made before the clock starts. Padded SDPA
gets every response with a copy of its prompt, padded before the clock starts. The variable-length peers gather the
prompts' keys and values in the timed call, because a model has to. FLOP are those of the visible pairs alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.measure import SHORT, Case, Peer, Unavailable, head_ceiling, imported, needs_cuda
from bench.harness.options import Spec, bench_one, run_bench
from bench.harness.timing import Outputs, Run
from bench.inputs.attention import AttentionInputs, Group, Padded, Varlen, attention_inputs, exact_attention, hh_like
from macpo.kernels import prefix_attention

OURS = "macpo prefix_attention"
OURS_TORCH, OURS_FLASH = "macpo, torch backend", "macpo, flash-attn backend"
FLEX, SDPA = "FlexAttention (compiled)", "padded SDPA"
VARLEN, FLASH = "torch varlen_attn, gathered prompts", "flash-attn varlen, gathered prompts"
PEERS = (OURS, OURS_TORCH, OURS_FLASH, FLEX, SDPA, VARLEN, FLASH)
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}


class Shape(NamedTuple):
    """Prompts with the lengths of their responses, and the attention's heads."""

    name: str
    groups: list[Group]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def case_name(self, mode: str) -> str:
        return f"{self.name} heads{self.heads}/{self.kv_heads} d{self.head_dim} {SHORT[self.dtype]} {mode}"


SHAPES: dict[str, list[Shape]] = {
    "small": [Shape("toy", [(7, [3, 5]), (4, [2, 6])], 4, 2, 16, torch.float32)],
    "issue": [
        Shape("hh8", hh_like(8), 8, 2, 64, torch.float32),
        Shape("2k-prompt", [(2048, [128, 128])], 8, 2, 64, torch.float32),
    ],
    "gpu": [
        Shape(name, groups, 32, 8, size, torch.bfloat16)
        for name, groups in (("hh64", hh_like(64)), ("8k-prompt", [(8192, [512, 512])]))
        for size in (128, 64)
    ],
}


def specs(shapes: str, device: torch.device) -> list[Spec]:
    return [
        Spec(shape.case_name(mode), partial(make_case, shape, mode, device))
        for shape in SHAPES[shapes]
        for mode in ("forward+backward", "forward")
    ]


def make_case(shape: Shape, mode: str, device: torch.device) -> Case:
    """Make the inputs and compute their float64 reference."""
    name, groups, heads, kv_heads, size, dtype = shape
    inputs = attention_inputs(groups, heads, kv_heads, size, dtype, device)
    backward = mode != "forward"
    reference = exact_attention(inputs, backward)
    pads = Padded.of(groups, device)
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_(backward)
    tokens = inputs.q.shape[0]
    side = GEMM_SIDE[device.type] if tokens > 100 else 64
    square = torch.randn(side, side, device=device).to(dtype)
    peers = [
        Peer(OURS, partial(build_packed, inputs, prefix_attention)),
        Peer(OURS_TORCH, partial(build_packed, inputs, partial(prefix_attention, backend="torch"))),
        Peer(OURS_FLASH, partial(build_packed, inputs, partial(prefix_attention, backend="flash"))),
        Peer(FLEX, partial(build_flex, inputs)),
        Peer(SDPA, partial(build_sdpa, inputs, pads), partial(unpad, pads, tokens)),
        Peer(VARLEN, partial(build_varlen, inputs, torch_varlen)),
        Peer(FLASH, partial(build_varlen, inputs, flash_varlen)),
    ]
    return Case(
        shape.case_name(mode),
        {
            "groups": name,
            "tokens": tokens,
            "padded_tokens": pads.index.numel(),
            "unpadded_tokens": int(pads.real.sum()),
            "visible_pairs": inputs.visible_pairs,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": size,
            "mode": mode,
        },
        dtype,
        device,
        peers,
        reference,
        flop=(14.0 if backward else 4.0) * size * heads * inputs.visible_pairs,
        **head_ceiling(square, square, f" {side} x {side} x {side}"),
    )


def finish(out: Tensor, leaves: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Outputs:
    """Return the output, and the gradients where they are asked for."""
    if not leaves[0].requires_grad:
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def build_packed(inputs: AttentionInputs, attend: Callable[..., Tensor]) -> Run:
    leaves = (inputs.q, inputs.k, inputs.v)
    return lambda: finish(attend(*leaves, inputs.segments), leaves, inputs.grad)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def build_flex(inputs: AttentionInputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask

    if inputs.q.device.type == "cpu" and inputs.q.requires_grad:
        raise Unavailable("FlexAttention has no backward on CPUs")
    segments, leaves = inputs.segments, (inputs.q, inputs.k, inputs.v)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = (key >= segments.prefix_start[query]) & (key < segments.prefix_end[query])
        return (key <= query) & (in_prefix | (key >= segments.segment_start[query]))

    tokens = inputs.q.shape[0]
    mask = create_block_mask(visible, None, None, tokens, tokens, device=inputs.q.device)
    flex = compiled_flex()

    def run() -> Outputs:
        q, k, v = (x.transpose(0, 1)[None] for x in leaves)
        out = flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        return finish(out, leaves, inputs.grad)

    return run


def build_sdpa(inputs: AttentionInputs, pads: Padded) -> Run:
    backward = inputs.q.requires_grad
    q, k, v = (pads.pad(x, pads.real).requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v))
    grad = pads.pad(inputs.grad, pads.first)  # a prompt's second copy gets no gradient of its own

    def run() -> Outputs:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return finish(out, (q, k, v), grad)

    return run


def unpad(pads: Padded, tokens: int, outputs: Outputs) -> Outputs:
    return {name: pads.pick(x, tokens) if name == "out" else pads.add(x, tokens) for name, x in outputs.items()}


def torch_varlen() -> Callable[..., Tensor]:
    varlen_attn = imported("torch.nn.attention.varlen", "varlen_attn", "this torch has no varlen_attn")
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


def flash_varlen() -> Callable[..., Tensor]:
    return partial(imported("flash_attn", "flash_attn_varlen_func", "flash-attn does not import"), causal=True)


def build_varlen(inputs: AttentionInputs, factory: Callable[[], Callable[..., Tensor]]) -> Run:
    needs_cuda(inputs.q.device)
    attend = factory()
    layout = Varlen.of(inputs.groups, inputs.q.device)
    runs = (layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
    leaves = (inputs.q, inputs.k, inputs.v)

    def run() -> Outputs:
        k, v = (x.index_select(0, layout.keys) for x in leaves[1:])
        return finish(attend(inputs.q, k, v, *runs), leaves, inputs.grad)

    return run


test_prefix_attention = bench_one

if __name__ == "__main__":
    run_bench("prefix_attention", specs, __doc__ or "")
