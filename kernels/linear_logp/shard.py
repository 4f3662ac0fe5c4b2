"""A head whose vocabulary is cut between processes, which compute their own tokens' logits and join them by row.

Every process has the same rows and targets and W[first:first + count]. A row's softmax is joined from its maxima and
sums in two exchanges; after that d = (onehot - softmax) of the own tokens needs nobody. With u = one head GEMM over
all rows and the whole vocabulary, a process does its share of the 1u, 2u, 3u or 4u of `chunked.py`.
dW and the bias's gradient cover a process's own tokens. dX is summed over processes in the backward of `replicated`.

Eager only: an exchange is a Python call that no custom operator takes. torch.compile runs it between two graphs, and
refuses it with fullgraph=True.
Legend: n rows of a chunk, h hidden size, v vocabulary of one process, r rank of a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from macpo.kernels.linear_logp import chunked, library, rows
from macpo.kernels.linear_logp.head import Gradient, Head, Needs
from macpo.kernels.linear_logp.scaling import scale_rows


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This process's part of a vocabulary that is cut as `torch.chunk` cuts, and how the processes exchange numbers.

    Raises:
        ValueError: a process would have no token.
    """

    vocab: int
    """Number of tokens of the whole head."""
    rank: int
    size: int
    """Number of processes."""
    maximum: Callable[[Tensor], Tensor]
    """Largest entries over all processes, as a new tensor; all of them call it, in the same order."""
    total: Callable[[Tensor], Tensor]
    """Sums over all processes, rounded once to the tensor's dtype; called like `maximum`."""

    def __post_init__(self) -> None:
        if self.vocab <= (self.size - 1) * self.most:
            raise ValueError(f"{self.vocab} tokens cut into {self.size} parts of {self.most} leave one without any")

    @property
    def most(self) -> int:
        """Tokens of the largest part, from which all that the processes must agree on is derived."""
        return -(-self.vocab // self.size)

    @property
    def first(self) -> int:
        return self.rank * self.most

    @property
    def count(self) -> int:
        return min(self.most, self.vocab - self.first)

    def local(self, target_n: Tensor) -> Local:
        token_n = target_n - self.first
        owned_n = (token_n >= 0) & (token_n < self.count)
        return Local(token_n.clamp(0, self.count - 1), owned_n, (target_n >= 0) & (target_n < self.vocab))

    def replicated(self, x: Tensor) -> Tensor:
        """Return x, which all processes hold; its gradient is summed over the processes."""
        out: Tensor = _Replicated.apply(self, x)
        return out


class Local(NamedTuple):
    """Targets [n] as a process sees them."""

    token_n: Tensor
    """Index in the process's own part: the target's, where the part holds it."""
    owned_n: Tensor
    """Whether the part holds the target."""
    known_n: Tensor
    """Whether the target is in the vocabulary, which is not checked on a GPU."""


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: VocabShard, x: Tensor) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.shard.total(grad.contiguous())


class Sums(NamedTuple):
    """Sums over the process's own logits, [n] each."""

    top_n: Tensor
    """The largest logit."""
    rest_n: Tensor
    """Sum of exp(y - top) over all tokens but `Local.token_n`."""
    y_n: Tensor
    """The logit of that token."""


def join(shard: VocabShard, sums: Sums, here: Local) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, logsumexp and this process's d logp / d y of its token [n], in float64.

    As in `triton_math.finish`, the target is kept out of the sum, so 1 - p of a confident row keeps its digits, and
    no log-prob is above 0.
    """
    top_n = shard.maximum(sums.top_n)
    shift_n = top_n.masked_fill(top_n == float("-inf"), 0.0).double()  # rows of -inf: no inf - inf
    e_n = (sums.y_n - shift_n).exp()
    others_n = sums.rest_n * (sums.top_n - shift_n).exp() + e_n.masked_fill(here.owned_n, 0.0)
    hit_n = sums.y_n.double().masked_fill(~here.owned_n, 0.0).masked_fill(~here.known_n, float("nan"))
    rest_n, hit_n = shard.total(torch.stack([others_n, hit_n]))
    gap_n = (hit_n - shift_n).clamp(max=0.0)
    hit_e_n = gap_n.exp()
    total_n = rest_n + hit_e_n
    logp_n = torch.where(rest_n < hit_e_n, -(rest_n / hit_e_n).log1p(), gap_n - total_n.log()).clamp(max=0.0)
    return logp_n, shift_n + total_n.log(), torch.where(here.owned_n, rest_n, -e_n) / total_n


@dataclass(frozen=True, slots=True)
class ShardHead(Head):
    """A `Head` over the process's own tokens; log-probs and gradients are exact for the whole vocabulary."""

    shard: VocabShard = field(kw_only=True)

    def score(self, hidden_nh: Tensor, target_n: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        here = self.shard.local(target_n)
        logp_n, lse_n, _ = join(self.shard, self._sums(self.logits(hidden_nh, buffer), here.token_n), here)
        return logp_n.to(self.dtype), lse_n.to(self.dtype)

    def _differentiate(self, hidden_nh: Tensor, target_n: Tensor, buffer: Tensor, out_nv: Tensor | None) -> Gradient:
        z_nv, here = self.logits(hidden_nh, buffer), self.shard.local(target_n)
        sums = self._sums(z_nv, here.token_n)
        logp_n, lse_n, own_n = join(self.shard, sums, here)
        lse_n = lse_n.to(self.dtype)
        return Gradient(logp_n.to(self.dtype), lse_n, self._gradient(z_nv, here, sums, lse_n, own_n, out_nv))

    def differentiate_again(self, hidden_nh: Tensor, target_n: Tensor, lse_n: Tensor, buffer: Tensor) -> Gradient:
        z_nv, here = self.logits(hidden_nh, buffer), self.shard.local(target_n)
        sums = self._sums(z_nv, here.token_n)
        own_n = here.owned_n.double() - (sums.y_n.double() - lse_n).exp()
        return Gradient(lse_n, lse_n, self._gradient(z_nv, here, sums, lse_n, own_n, None))

    def _gradient(
        self, z_nv: Tensor, here: Local, sums: Sums, lse_n: Tensor, own_n: Tensor, out_nv: Tensor | None
    ) -> Tensor:
        """d [n, v] from logsumexps and d logp / d y of the own tokens."""
        slope_n = self.scale if self.softcap is None else self.scale * (1 - (sums.y_n.double() / self.softcap) ** 2)
        d_nv = self.dlogits_(z_nv, here.token_n, lse_n, out_nv)
        return d_nv.scatter_(1, here.token_n[:, None], (own_n * slope_n)[:, None].to(d_nv.dtype))

    def _sums(self, z_nv: Tensor, token_n: Tensor) -> Sums:
        partials = rows.kernels(z_nv, self.backend).row_partials
        return Sums(*partials(z_nv, token_n, self.row_bias, self.scale, self.softcap))


HeadOf = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], ShardHead]
"""Makes the head from weight, bias and the LoRA's factors."""


@torch.compiler.disable
def linear_logp(
    head_of: HeadOf, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    target: Tensor, shard: VocabShard, chunk_rows: int, needs: list[bool],
) -> Tensor:  # fmt: skip
    """Log-probs [N]; `op.linear_logp` has checked everything but the targets."""
    library.check_target(target, shard.vocab)
    hidden, lora_a = shard.replicated(hidden), None if lora_a is None else shard.replicated(lora_a)
    logp: Tensor = _LinearLogp.apply(head_of, target, chunk_rows, needs, hidden, weight, bias, lora_a, lora_b)
    return logp


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head_of: HeadOf, target: Tensor, chunk_rows: int, needs: list[bool], hidden: Tensor, *weights: Any
    ) -> Tensor:
        logp_n, *kept = chunked.forward(head_of(*weights), hidden, target, chunk_rows, Needs(*needs))
        ctx.head_of, ctx.chunk_rows, ctx.needs = head_of, chunk_rows, needs
        ctx.save_for_backward(target, hidden, *weights, *kept)
        return logp_n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("linear_logp")
        target, hidden, *weights, lse_n, dx_nh, d_nv, _ = ctx.saved_tensors
        if dx_nh is not None:
            return (*[None] * 4, scale_rows(dx_nh, grad), *[None] * 4)
        args = hidden, target, lse_n, d_nv, grad, Needs(*ctx.needs), ctx.chunk_rows
        grads = library.as_outputs(chunked.backward(ctx.head_of(*weights), *args), hidden)
        return (*[None] * 4, *library.or_none(grads, ctx.needs))
