"""The C++ product with an epilogue of its own (`native.head_logp`) and the operators over it."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import assert_close, bf16, framed, threads
from torch import Tensor

from macpo.kernels import linear_logp, native, pair_loss
from macpo.kernels.linear_logp import reference
from macpo.kernels.linear_logp.tuning import route_of
from macpo.kernels.pair_loss import reference as pair_reference

pytestmark = pytest.mark.skipif(not native.has_bf16_gemm(), reason="needs a CPU with AVX512-BF16")


def exact(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """Log-probs, logsumexps and d logp / d z in float64."""
    z = hidden.double() @ weight.double().T
    y = scale * (z if bias is None else z + bias.double())
    d = scale * (torch.nn.functional.one_hot(target, len(weight)) - y.softmax(-1))
    return y.log_softmax(-1).gather(1, target[:, None])[:, 0], y.logsumexp(-1), d


# n, h, v: one element; ragged panels of 32 rows and tiles of 48 tokens; h past the 2,048 values that are summed before
# a tile is finished, with more than one panel.
@pytest.mark.parametrize(("num_rows", "width", "vocab"), [(1, 1, 1), (33, 20, 97), (70, 2051, 50), (64, 64, 480)])
@pytest.mark.parametrize(("with_bias", "scale"), [(False, 1.0), (True, -0.5)])
def test_log_probs_and_gradients(num_rows, width, vocab, with_bias, scale):
    hidden, hidden_frame = framed(bf16(num_rows, width, scale=3 * width**-0.5))
    weight, weight_frame = framed(bf16(vocab, width, seed=1))
    g = torch.Generator().manual_seed(2)
    target = torch.randint(vocab, (num_rows,), generator=g)
    bias = torch.randn(vocab, generator=g) if with_bias else None
    d, d_frame = framed(torch.zeros(num_rows, vocab, dtype=torch.bfloat16), lanes=True)
    logp, lse, factor = native.head_logp(hidden, weight, target, bias, scale, d)
    right = exact(hidden, weight, target, bias, scale)
    assert_close(logp, right[0], torch.float32)
    assert_close(lse, right[1], torch.float32)
    assert_close(d.double() * factor[:, None], right[2], torch.bfloat16)
    assert logp.max() <= 0
    assert all(around().isnan().all() for around in (hidden_frame, weight_frame, d_frame))
    scores = native.head_logp(hidden.contiguous(), weight.contiguous(), target, bias, scale)
    assert all(map(torch.equal, scores, (logp, lse, factor)))


def test_targets_far_below_the_best_token():
    """Rows whose sums overflow are done anew: as right as the others, and the others as without them."""
    num_rows, vocab = 80, 300
    hidden, weight = bf16(num_rows, 64), bf16(vocab, 64, seed=1)
    target = torch.arange(num_rows)
    hidden[::2] *= 40  # the best token some hundred nats above the target, in more rows than a panel has
    d = torch.empty(vocab, num_rows, dtype=torch.bfloat16).T
    logp, lse, factor = native.head_logp(hidden, weight, target, None, 1.0, d)
    right = exact(hidden, weight, target, None, 1.0)
    assert (right[0] < -100).sum() > 32
    assert_close(logp, right[0], torch.float32)
    assert_close(lse, right[1], torch.float32)
    assert_close(d.double() * factor[:, None], right[2], torch.bfloat16)
    alone = native.head_logp(hidden[1::2].contiguous(), weight, target[1::2], None, 1.0)
    assert all(torch.equal(one, other[1::2]) for one, other in zip(alone, (logp, lse, factor), strict=True))


def test_masked_tokens_and_rows_that_are_not_finite():
    hidden, weight, target = bf16(5, 16), bf16(90, 16, seed=1), torch.tensor([3, 50, 60, 7, 8])
    bias = torch.zeros(90)
    bias[50:] = -math.inf  # as padding of a vocabulary is masked
    hidden[3, 2], hidden[4, 0] = math.nan, math.inf
    d = torch.empty(90, 5, dtype=torch.bfloat16).T
    logp, lse, factor = native.head_logp(hidden, weight, target, bias, 1.0, d)
    right = exact(hidden, weight, target, bias, 1.0)
    assert_close(logp[:1], right[0][:1], torch.float32)
    assert logp[1:3].tolist() == [-math.inf] * 2 and logp[3:].isnan().all()
    assert_close(lse[:3], right[1][:3], torch.float32)
    assert_close(d[:3].double() * factor[:3, None], right[2][:3], torch.bfloat16)
    assert (d.float() * factor[:, None])[3:].isnan().any(dim=1).all()


def test_errors_are_no_larger_than_those_of_float32_logits():
    """With confident rows; log-probs near 0 keep their digits."""
    hidden, weight = bf16(192, 512), bf16(2000, 512, seed=1, scale=3 * 512**-0.5)
    target = torch.arange(192) % 50
    weight[:50] = hidden[:50] * 0.05  # hidden i finds token i
    right = exact(hidden, weight, target, None, 1.0)[0]
    assert (right > -1e-3).sum() >= 40
    logp = native.head_logp(hidden, weight, target, None, 1.0)[0]
    eager = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert (logp - right).square().mean() <= 1.1**2 * (eager - right).square().mean()
    sure = right > -1e-3
    assert_close(logp[sure] / right[sure], torch.ones(int(sure.sum())), torch.float32)


def test_threads_and_other_rows_do_not_change_a_bit():
    hidden, weight, target = bf16(70, 200), bf16(2500, 200, seed=1), torch.arange(70)
    assert weight.numel() >= native.PARALLEL_ELEMENTS
    results = []
    for count in (1, 2, 3):
        with threads(count):
            d = torch.empty(2500, 70, dtype=torch.bfloat16).T
            results.append([*native.head_logp(hidden, weight, target, None, 0.7, d), d])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
    assert torch.equal(native.head_logp(hidden[40:], weight, target[40:], None, 0.7)[0], results[0][0][40:])


def test_it_refuses_what_does_not_fit():
    hidden, weight, target = bf16(2, 4), bf16(7, 4), torch.tensor([0, 6])
    d = torch.empty(7, 2, dtype=torch.bfloat16).T
    for message, args in (
        ("bfloat16 matrices", (hidden.float(), weight, target, None, 1.0)),
        ("bfloat16 matrices", (hidden, weight, target, None, 1.0, d.float())),
        ("do not fit", (bf16(2, 5), weight, target, None, 1.0)),
        ("do not fit", (bf16(2, 0), bf16(7, 0), target, None, 1.0)),
        ("rows of hidden and weight", (hidden, bf16(4, 7).T, target, None, 1.0)),
        ("outside the vocabulary", (hidden, weight, target + 1, None, 1.0)),
        ("bias must have", (hidden, weight, target, torch.zeros(6), 1.0)),
        (r"d must be \[V, N\]", (hidden, weight, target, None, 1.0, d.contiguous())),
    ):
        with pytest.raises(ValueError, match=message):
            native.head_logp(*args)
    assert native.head_logp(bf16(0, 4), weight, target[:0], None, 1.0)[0].shape == (0,)


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias")], ids=len)
@pytest.mark.parametrize("chunk_rows", [4, 30])
def test_operators_take_it_and_agree_with_the_reference(trained, chunk_rows, monkeypatch):
    """Several chunks, a pair longer than a chunk and one block; each is our own product (`seen`)."""
    g = torch.Generator().manual_seed(8)
    sizes = {"hidden": (17, 12), "weight": (300, 12), "bias": (300,)}
    tensors = {name: torch.randn(size, generator=g).bfloat16() for name, size in sizes.items()}
    target, grad = torch.randint(300, (17,), generator=g), torch.randn(17, generator=g)
    cu_rows, refs = torch.tensor([0, 3, 5, 14, 17], dtype=torch.int32), torch.randn(4, generator=g) - 20
    seen = []
    own = native.head_logp
    monkeypatch.setattr(native, "head_logp", lambda *args: seen.append(1) or own(*args))

    def run(fn, dtype, *args, of=lambda out: out, **more):
        leaves = {name: x.to(dtype, copy=True).requires_grad_(name in trained) for name, x in tensors.items()}
        out = of(fn(leaves["hidden"], leaves["weight"], *args, bias=leaves["bias"], logit_scale=0.5, **more))
        if trained:
            (out @ grad.to(out.dtype) if out.dim() else out).backward()
        return [out.detach(), *(leaves[name].grad for name in trained)]

    def check(fn, right, *args, of=lambda out: out):
        seen.clear()
        options = {"backend": "native", "chunk_rows": chunk_rows}
        got, again = (run(fn, torch.bfloat16, *args, of=of, **options) for _ in range(2))
        assert seen
        vendor = run(fn, torch.bfloat16, *args, of=of, **options, route="vendor")
        expected = run(right, torch.float64, *args)
        for value, same, other, target_value in zip(got, again, vendor, expected, strict=True):
            precision = torch.float32 if value.dtype == torch.float32 else torch.bfloat16
            assert_close(value, target_value, precision)
            assert_close(other, target_value, precision)
            assert torch.equal(value, same)

    check(linear_logp, reference.linear_logp, target)
    check(pair_loss, pair_reference.pair_loss, target, cu_rows, refs, of=lambda out: out.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": True}, "has no softcap"),
        ({"lora": True}, "a LoRA is added"),
        ({"sharded": True}, "another process may have"),
        ({"contiguous": False}, "not contiguous"),
    ],
)
def test_what_it_cannot_do_takes_the_vendors_product(options, message):
    cpu = torch.device("cpu")
    for score in (False, True):
        assert route_of(None, "native", cpu, torch.bfloat16, score=score) == "epilogue"
        assert route_of(None, "native", cpu, torch.bfloat16, score=score, **options) == "vendor"
        with pytest.raises(ValueError, match=message):
            route_of("epilogue", "native", cpu, torch.bfloat16, score=score, **options)
    assert route_of(None, "native", cpu, torch.float32, score=True) == "vendor"
