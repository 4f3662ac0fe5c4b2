"""Packed prompt groups for the attention benchmarks, the layouts that peers want, and the float64 reference.

Legend: t packed tokens, s sequences (prompt + one response) of a padded peer, l their longest, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from macpo.kernels import Segments
from macpo.kernels.prefix_attention import reference

Group = tuple[int, list[int]]  # prompt tokens, tokens of each response


def hh_like(num_groups: int) -> list[Group]:
    """Draw pairs with lengths like HH-RLHF's: log-normal, median prompt 150 tokens, median response 60."""
    g = torch.Generator().manual_seed(5)
    prompt = (150 * torch.exp(0.5 * torch.randn(num_groups, generator=g))).clamp(16, 600).long().tolist()
    response = (60 * torch.exp(0.5 * torch.randn(num_groups, 2, generator=g))).clamp(4, 250).long().tolist()
    return list(zip(prompt, response, strict=True))


@dataclass(frozen=True)
class AttentionInputs:
    """q [T, Hq, D], k and v [T, Hkv, D], the gradient of the output [T, Hq, D], and the visible segments."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    groups: list[Group]
    segments: Segments

    @property
    def visible_pairs(self) -> int:
        """Number of visible query-key pairs."""
        return sum(
            prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
            for prompt, responses in self.groups
        )


def attention_inputs(
    groups: list[Group], heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> AttentionInputs:
    g = torch.Generator().manual_seed(11)
    tokens = sum(prompt + sum(responses) for prompt, responses in groups)
    shapes = [(tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size), (tokens, heads, size)]
    q, k, v, grad = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes)
    return AttentionInputs(q, k, v, grad, groups, Segments.from_lengths(groups).to(device))


def exact_attention(inputs: AttentionInputs, backward: bool) -> dict[str, Tensor]:
    """Compute output and gradients in float64, by group and key head, so that the masks stay small."""
    ratio = inputs.q.shape[1] // inputs.k.shape[1]
    found = {
        name: torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for name, x in (("out", inputs.q), ("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v))
    }
    start = 0
    for prompt, responses in inputs.groups:
        stop = start + prompt + sum(responses)
        segments = Segments.from_lengths([(prompt, responses)]).to(inputs.q.device)
        for head in range(inputs.q.shape[1]):
            at, kv = ((slice(start, stop), slice(h, h + 1)) for h in (head, head // ratio))
            q, k, v = (x.detach().double().requires_grad_(backward) for x in (inputs.q[at], inputs.k[kv], inputs.v[kv]))
            out = reference.prefix_attention(q, k, v, segments)
            found["out"][at] = out.detach()
            if backward:
                dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.grad[at].double())
                found["dq"][at] = dq
                found["dk"][kv] += dk
                found["dv"][kv] += dv
        start = stop
    return found if backward else {"out": found["out"]}


@dataclass(frozen=True)
class Padded:
    """Every response with a copy of its prompt, padded on the right to the longest."""

    index: Tensor  # int64 [s, l]: packed token, 0 where padding
    real: Tensor  # bool [s, l]
    first: Tensor  # bool [s, l]: real, and the copy that stands for the token (a prompt's first)

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Padded:
        rows, firsts = [], []
        start = 0
        for prompt, responses in groups:
            at = start + prompt
            for number, length in enumerate(responses):
                rows.append(torch.cat([torch.arange(start, start + prompt), torch.arange(at, at + length)]))
                firsts.append(torch.cat([torch.full((prompt,), number == 0), torch.ones(length, dtype=torch.bool)]))
                at += length
            start = at
        longest = max(len(row) for row in rows)
        index = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
        real = torch.stack([torch.arange(longest) < len(row) for row in rows])
        first = torch.stack([F.pad(mark, (0, longest - len(mark))) for mark in firsts])
        return cls(index.to(device), real.to(device), first.to(device))

    def pad(self, x: Tensor, mark: Tensor) -> Tensor:
        """[T, H, D] -> [s, H, l, D], zero where `mark` [s, l] is not set."""
        return (x.detach()[self.index] * mark[:, :, None, None]).transpose(1, 2).contiguous()

    def pick(self, x: Tensor, num_tokens: int) -> Tensor:
        """[s, H, l, D] -> [T, H, D]: the first copy of every token."""
        rows = x.transpose(1, 2)[self.first]
        return rows.new_zeros(num_tokens, *rows.shape[1:]).index_copy(0, self.index[self.first], rows)

    def add(self, x: Tensor, num_tokens: int) -> Tensor:
        """[s, H, l, D] -> [T, H, D] in float32: the sum over the copies of every token."""
        rows = x.transpose(1, 2)[self.real].float()
        return rows.new_zeros(num_tokens, *rows.shape[1:]).index_add(0, self.index[self.real], rows)


@dataclass(frozen=True)
class Varlen:
    """Each prompt and each response as a sequence of queries, its keys the prompt's followed by its own."""

    keys: Tensor  # int64: packed token of every gathered key
    cu_q: Tensor  # int32 [runs + 1]
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Varlen:
        keys, queries = [], []
        at = 0
        for prompt, responses in groups:
            before = torch.arange(at, at + prompt)
            for length in (0, *responses):
                keys.append(torch.cat([before, torch.arange(at, at + length)]))
                queries.append(length or prompt)
                at += length or prompt
        lengths = [len(row) for row in keys]
        cu_q, cu_k = (F.pad(torch.tensor(n).cumsum(0), (1, 0)).int().to(device) for n in (queries, lengths))
        return cls(torch.cat(keys).to(device), cu_q, cu_k, max(queries), max(lengths))
