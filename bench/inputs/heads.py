"""Inputs of the head benchmarks: hidden states whose logits are random, or distributed as a trained model's.

Random: hidden and weight are normal and logits have standard deviation 1, so that softmax is near uniform. No trained
model looks like that, and kernels that skip small gradients look bad on it.

Text-like: token frequencies follow Zipf's law, p(rank) ~ 1 / (rank + 2.7) ** 1.05, over shuffled ids. The head is
normal vectors w_v of length 1 plus log p(v) times one common direction u; every hidden state holds u once, so its base
logits are the log-frequencies. Each row then wants its target at probability p, logit p ~ N(0.5, 3): many rows certain,
many uncertain, about 1.2 nats a token, as language models on text. Four competitors drawn by frequency want 80% of the
rest in halving shares, and the base distribution has what is left. The hidden state gets, along each of these five
w_v, the logit that makes it so; the noise that this puts on all other logits (w_v are nearly orthogonal) is allowed
for in the mean. `describe` measures the result.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from macpo.kernels.linear_logp import reference

KINDS = ("random", "text")
BETA = 0.1
SHARES = (0.8 * 8 / 15, 0.8 * 4 / 15, 0.8 * 2 / 15, 0.8 * 1 / 15)  # of the mass that the target leaves


@dataclass(frozen=True)
class HeadInputs:
    """One batch for a head; sequences c0, r0, c1, r1, ... of equal length, so that padding peers lose nothing."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N]
    cu_rows: Tensor  # int32 [2B + 1], CPU
    ref_hidden: Tensor  # [N, H]: the reference policy's hidden states, for peers that compute its log-probs
    kind: str

    @property
    def num_sequences(self) -> int:
        return self.cu_rows.numel() - 1

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]


@functools.lru_cache(maxsize=1)
def head_inputs(
    num_rows: int, hidden_size: int, vocab: int, kind: str, dtype: torch.dtype, device: torch.device, num_pairs: int
) -> HeadInputs:
    """Draw inputs of `kind` on the device in float32. Consecutive cases share them; each case sets which take a
    gradient.

    Raises:
        ValueError: an unknown kind, or rows that do not make pairs of equal sequences.
    """
    if num_rows % (2 * num_pairs):
        raise ValueError(f"{num_rows} rows do not make {num_pairs} pairs of equal sequences")
    g = torch.Generator(device).manual_seed(20261122)
    if kind == "random":
        hidden = torch.randn(num_rows, hidden_size, generator=g, device=device)
        weight = torch.randn(vocab, hidden_size, generator=g, device=device).div_(hidden_size**0.5)
        target = torch.randint(vocab, (num_rows,), generator=g, device=device)
    elif kind == "text":
        hidden, weight, target = _text(num_rows, hidden_size, vocab, g)
    else:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    ref_hidden = hidden + 0.01 * hidden.std() * torch.randn(hidden.shape, generator=g, device=device)
    length = num_rows // (2 * num_pairs)
    return HeadInputs(
        hidden.to(dtype),
        weight.to(dtype),
        target,
        torch.arange(0, num_rows + 1, length, dtype=torch.int32),
        ref_hidden.to(dtype),
        kind,
    )


def _text(num_rows: int, hidden_size: int, vocab: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and target of the text-like kind; see the file's top."""
    device = g.device
    frequency = 1 / (torch.arange(vocab, dtype=torch.float64, device=device) + 1 + 2.7) ** 1.05
    frequency = (frequency / frequency.sum())[torch.randperm(vocab, generator=g, device=device)]
    log_v = frequency.log().float()
    weight = torch.randn(vocab, hidden_size, generator=g, device=device)
    weight[:, 0] = 0.0  # the common direction is the first axis
    weight = F.normalize(weight, dim=-1)
    weight[:, 0] = log_v
    common = torch.zeros(hidden_size, device=device)
    common[0] = 1.0

    tokens = torch.multinomial(frequency, 5 * num_rows, replacement=True, generator=g).view(num_rows, 5)
    p = torch.sigmoid(0.5 + 3 * torch.randn(num_rows, generator=g, device=device)).clamp(1e-4, 0.9995)
    mass = torch.cat([p[:, None], (1 - p)[:, None] * torch.tensor(SHARES, device=device)], dim=1)
    wanted = mass.log() - (0.2 * (1 - p)).log()[:, None] - log_v[tokens]  # logit above the base distribution
    wanted = wanted + (wanted.square().sum(1, keepdim=True) / (2 * hidden_size)).clamp(max=2.0)
    directions = weight[tokens].clone()
    directions[:, :, 0] = 0.0
    hidden = torch.einsum("nk,nkh->nh", wanted, directions) + common
    return hidden, weight, tokens[:, 0].clone()


def describe(inputs: HeadInputs, num_rows: int = 512) -> dict[str, float]:
    """Measure on the first rows how peaked the distribution is."""
    logp_nv = reference.head_logits(inputs.hidden[:num_rows].detach(), inputs.weight.detach(), None, 1.0, None)
    logp_nv = logp_nv.log_softmax(-1)
    target_n = logp_nv.gather(1, inputs.target[:num_rows, None]).exp().squeeze(1)
    top_n = logp_nv.max(-1).values.exp()
    return {
        "mean_nll": round(-target_n.log().mean().item(), 3),
        "target_p_median": round(target_n.median().item(), 4),
        "rows_with_top_p_above_0.9": round((top_n > 0.9).float().mean().item(), 3),
        "rows_with_top_p_below_0.1": round((top_n < 0.1).float().mean().item(), 3),
        "share_of_probabilities_above_2^-12": round((logp_nv > -12 * 0.6931).float().mean().item(), 6),
    }


# --- the float64 reference, in row chunks so that it fits where the operators do -------------------------------------

REFERENCE_ELEMENTS = 2**25


def _chunks(inputs: HeadInputs) -> list[slice]:
    step = max(1, REFERENCE_ELEMENTS // inputs.weight.shape[0])
    return [slice(start, start + step) for start in range(0, inputs.num_rows, step)]


def reference_logp(inputs: HeadInputs, hidden: Tensor | None = None) -> Tensor:
    """Return log-probs [N] in float64."""
    hidden, weight = (inputs.hidden if hidden is None else hidden).detach(), inputs.weight.detach().double()
    parts = [reference.linear_logp(hidden[c].double(), weight, inputs.target[c]) for c in _chunks(inputs)]
    return torch.cat(parts)


def reference_gradients(inputs: HeadInputs, grad_n: Tensor) -> dict[str, Tensor]:
    """Return the gradients of sum(grad * logp) for hidden and weight, in float64."""
    weight = inputs.weight.detach().double().requires_grad_()
    dhidden = torch.empty(inputs.hidden.shape, dtype=torch.float64, device=inputs.hidden.device)
    for part in _chunks(inputs):
        hidden = inputs.hidden[part].detach().double().requires_grad_()
        logp = reference.linear_logp(hidden, weight, inputs.target[part])
        logp.backward(grad_n[part].double())
        assert hidden.grad is not None
        dhidden[part] = hidden.grad
    assert weight.grad is not None
    return {"dhidden": dhidden, "dweight": weight.grad}


def dpo(logp_n: Tensor, num_sequences: int, ref_logps: Tensor | None) -> Tensor:
    """Compute sigmoid DPO (arXiv 2305.18290, eq. 7) of equal sequences c0, r0, c1, r1, ..., in logp's dtype."""
    sums = logp_n.view(num_sequences, -1).sum(1)
    ratios = sums if ref_logps is None else sums - ref_logps.to(sums.dtype)
    return -F.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()


def pair_reference(inputs: HeadInputs, ref_logps: Tensor | None) -> dict[str, Tensor]:
    """Return loss and gradients in float64."""
    logp = reference_logp(inputs).requires_grad_()
    loss = dpo(logp, inputs.num_sequences, None if ref_logps is None else ref_logps.double())
    (grad_n,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.detach(), **reference_gradients(inputs, grad_n)}
