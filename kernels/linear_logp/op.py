"""linear_logp: token log-probs straight from hidden states and the head."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from macpo.kernels.backend import explain
from macpo.kernels.linear_logp import library
from macpo.kernels.linear_logp import shard as sharded
from macpo.kernels.linear_logp.head import default_chunk_rows
from macpo.kernels.linear_logp.shard import HeadOf, ShardHead, VocabShard
from macpo.kernels.linear_logp.tuning import route_of


class Lora(NamedTuple):
    """A low-rank update of the head: W' = W + scaling * b a. A plain tuple of the three does as well."""

    a: Tensor
    """[r, H], dtype of the weight."""
    b: Tensor
    """[V, r], dtype of the weight."""
    scaling: float


LoraLike: TypeAlias = Lora | tuple[Tensor, Tensor, float]


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoraLike | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    route: str | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """log softmax(head(hidden))[target], row by row; differentiable in hidden, weight, bias and the LoRA's factors.

    head(h) = softcap * tanh(logit_scale * (h W' + b) / softcap); without softcap, logit_scale * (h W' + b).
    Only inputs that take gradient cost one; logits exist for one chunk of rows at a time. Once differentiable.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], dtype of hidden.
        target: [N] int64 in [0, V).
        bias: [V], dtype of hidden.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`.
        lora: (a [r, H], b [V, r], scaling): the head is W + scaling * b a, which is never formed.
        chunk_rows: rows whose logits exist at once; default as many as fit 32 MiB on a CPU, 256 MiB on a GPU. For a
            trained 16-bit weight the gradients of several chunks are also held, in as much memory as the weight has,
            or twice as much where all rows fit into that.
        backend: force one; default by device (`macpo.kernels.backend`).
        route: "vendor" or "epilogue" (`tuning.py`), for measurements; default the one measured faster on this device.
        shard: the vocabulary is cut between processes (`shard.py`): weight, bias and the LoRA's b have this process's
            rows, hidden, target and the LoRA's a are the same everywhere, and so is the result. Eager only.

    Returns:
        [N] float32 (float64 for float64 inputs), never above 0.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together, a target outside the vocabulary.
        BackendError: the forced backend is not there.
        RuntimeError: a backward with create_graph=True.
    """
    check_head(hidden, weight, target, bias, logit_scale, softcap, lora, shard)
    a, b, scaling = (None, None, 1.0) if lora is None else lora
    chosen_backend, needs, chosen_route, chunk_rows = choose(
        "linear_logp", hidden, weight, bias, softcap, lora, chunk_rows, backend, route, shard
    )
    if shard is not None:
        head_of = shard_head(scaling, logit_scale, softcap, chosen_backend, shard)
        return sharded.linear_logp(head_of, hidden, weight, bias, a, b, target, shard, chunk_rows, needs)
    logp: Tensor = library.linear_logp(
        hidden, weight, bias, a, b, target, float(scaling), float(logit_scale),
        None if softcap is None else float(softcap), chunk_rows, chosen_backend, needs, chosen_route,
    )[0]  # fmt: skip
    return logp


def choose(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, lora: LoraLike | None,
    chunk_rows: int | None, backend: str | None, route: str | None, shard: VocabShard | None,
) -> tuple[str, list[bool], str, int]:  # fmt: skip
    """The backend, which of hidden, weight, bias and the LoRA's factors take gradient, the route, rows of a chunk."""
    chosen_backend = backend_of(op, hidden.device.type, backend)
    inputs = hidden, weight, bias, *((None, None) if lora is None else lora[:2])
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    chosen_route = route_of(
        route, chosen_backend, hidden.device, hidden.dtype, score=not any(needs), lora=lora is not None,
        softcap=softcap is not None, sharded=shard is not None, contiguous=hidden.stride(1) == weight.stride(1) == 1,
    )  # fmt: skip
    return chosen_backend, needs, chosen_route, rows_of_chunk(chunk_rows, weight, chosen_route, shard)


@torch.compiler.assume_constant_result
def backend_of(op: str, device: str, backend: str | None) -> str:
    """`explain`'s choice; a compiled graph keeps the one of its compilation."""
    return explain(op, device, backend).backend


def rows_of_chunk(chunk_rows: int | None, weight: Tensor, route: str, shard: VocabShard | None = None) -> int:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    vocab = weight.shape[0] if shard is None else shard.most
    return chunk_rows or default_chunk_rows(vocab, weight.device.type, route)


def shard_head(lora_scaling: float, scale: float, softcap: float | None, backend: str, shard: VocabShard) -> HeadOf:
    scalars = float(lora_scaling), float(scale), None if softcap is None else float(softcap)
    return lambda weight, bias, a, b: ShardHead(weight, bias, a, b, *scalars, backend, shard=shard)


def check_head(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None,
    lora: LoraLike | None = None, shard: VocabShard | None = None,
) -> None:  # fmt: skip
    """Raise ValueError where the inputs of a head operator do not fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], got {target.dtype} {list(target.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    if not _finite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if softcap is not None and not (_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive, got {softcap}")
    if lora is not None:
        _check_lora(weight, *lora)
    if shard is not None and weight.shape[0] != shard.count:
        raise ValueError(
            f"part {shard.rank} of {shard.size} of {shard.vocab} tokens has {shard.count}, weight {weight.shape[0]}"
        )


def _finite(value: float) -> bool:
    """math.isfinite, for numbers that torch.compile has made symbols as well."""
    return -math.inf < value < math.inf


def _check_lora(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    vocab, hidden_size = weight.shape
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden_size or b.shape != (vocab, a.shape[0]):
        raise ValueError(
            f"lora must be a [r, {hidden_size}] and b [{vocab}, r], got {list(a.shape)} and {list(b.shape)}"
        )
    if a.dtype != weight.dtype or b.dtype != weight.dtype:
        raise ValueError(f"lora's a and b must be {weight.dtype}, got {a.dtype} and {b.dtype}")
    if not _finite(scaling):
        raise ValueError(f"lora's scaling must be finite, got {scaling}")
