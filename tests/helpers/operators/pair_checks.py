"""What the tests of pair_loss share: its losses with their settings, and inputs."""

from __future__ import annotations

import torch

from macpo.kernels import linear_logp, sequence_sums
from macpo.kernels.pair_loss.losses import REFERENCE_FREE

# Every loss, and every parameter with the losses that it means something for.
LOSS_CASES = {
    "sigmoid": {"loss": "sigmoid"},
    "cdpo": {"loss": "sigmoid", "label_smoothing": 0.1},
    "ld_dpo": {"loss": "sigmoid", "ld_alpha": 0.4},
    "sigmoid_norm": {"loss": "sigmoid_norm"},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "ld_hinge": {"loss": "hinge", "ld_alpha": 0.0},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "simpo": {"loss": "simpo", "gamma": 0.4},
    "orpo": {"loss": "orpo"},
}
HEADS = {
    "plain": {},
    "all": {"bias": True, "logit_scale": 1.5, "softcap": 3.0},
    "lora": {"lora": 2},
}
# One pair of single tokens; ragged pairs, one of which has a single token.
LENGTHS = [(1, 1), (3, 7, 1, 4, 6, 2)]


def make(lengths, head, dtype=torch.float32, hidden_size=6, vocab=19, loss="sigmoid"):
    """Inputs by name, target, cu_rows, reference log-probs (None for losses without), and the head's options."""
    g = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    num_rows = int(cu[-1])
    tensors = {
        "hidden": torch.randn(num_rows, hidden_size, generator=g),
        "weight": torch.randn(vocab, hidden_size, generator=g),
    }
    if head.get("bias"):
        tensors["bias"] = torch.randn(vocab, generator=g)
    target = torch.randint(vocab, (num_rows,), generator=g)
    if rank := head.get("lora"):
        tensors["lora_a"] = torch.randn(rank, hidden_size, generator=g)
        tensors["lora_b"] = torch.randn(vocab, rank, generator=g)
    options = {k: v for k, v in head.items() if k not in ("bias", "lora")}
    logp = linear_logp(tensors["hidden"], tensors["weight"], target, **options, **extra(tensors))
    ratios = torch.tensor([-0.8, 0.5, 2.0, -1.0, -3.0, 1.5])  # of either sign; IPO's target, 1.7 at beta 0.3, is none
    ref_logps = sequence_sums(logp, cu) - ratios[: len(lengths)]
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    return tensors, target, cu, None if loss in REFERENCE_FREE else ref_logps, options


def extra(tensors):
    """The optional inputs as keywords."""
    keywords = {"bias": tensors["bias"]} if "bias" in tensors else {}
    return keywords | ({"lora": (tensors["lora_a"], tensors["lora_b"], 0.7)} if "lora_a" in tensors else {})


def run(fn, tensors, *args, trained, **options):
    """The detached loss, and the gradients of the inputs that are `trained`."""
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in tensors.items()}
    out = fn(leaves["hidden"], leaves["weight"], *args, **extra(leaves), **options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    return loss.detach(), {name: leaves[name].grad for name in leaves if name in trained}
