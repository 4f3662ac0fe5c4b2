"""linear_logp: values and every gradient against a float64 reference; memory; errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_checks import BACKENDS, DEVICE, TOLERANCE, TRITON, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from macpo.kernels import linear_logp, sequence_sums
from macpo.kernels.linear_logp import chunked, reference
from macpo.kernels.linear_logp.head import Head, Needs, chunks, default_chunk_rows

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 1.5, "softcap": 3.0},
}
SIZES = [
    (1, 1, 2),  # one row, the smallest head
    (7, 16, 11),  # odd, V below one vector of the native kernel
    (33, 24, 257),  # V one above the native kernel's block of 256
    (5, 8, 1031),  # V prime, several blocks and a tail
]


def make(sizes, head, dtype, seed=0):
    num_rows, hidden_size, vocab = sizes
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=g).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=g).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype) if head.get("bias") else None
    target = torch.randint(vocab, (num_rows,), generator=g)
    options = {k: v for k, v in head.items() if k != "bias"}
    return hidden, weight, bias, target, torch.randn(num_rows, generator=g), options


def gradients(fn, hidden, weight, bias, target, grad, options, trained):
    """logp and the gradients of the named inputs, None for the rest."""
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        name: None if value is None else value.clone().requires_grad_(name in trained) for name, value in inputs.items()
    }
    logp = fn(leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], **options)
    logp.backward(grad.to(logp.dtype))
    return logp.detach(), {name: leaves[name].grad for name in trained if leaves[name] is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [None, 1, 4], ids=lambda c: f"chunk{c}")
def test_values_and_gradients_equal_float64(backend, sizes, head, chunk_rows):
    hidden, weight, bias, target, grad, options = make(sizes, HEADS[head], torch.float32)
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    expected, expected_grads = gradients(
        reference.linear_logp, *wide, target, grad, options, ("hidden", "weight", "bias")
    )
    chosen = {**options, "chunk_rows": chunk_rows, "backend": backend}
    # Frozen head (the LoRA case), trained head, everything: the three routes of the backward.
    for trained in (("hidden",), ("weight", "bias"), ("hidden", "weight", "bias")):
        logp, grads = gradients(linear_logp, hidden, weight, bias, target, grad, chosen, trained)
        assert logp.dtype == torch.float32
        # A single row may be confident (here p = 0.99): its log-prob and gradient come from 1 - p.
        floor = 1.0 if sizes[0] == 1 else 0.0
        assert_close(logp, expected, torch.float32, "logp", floor)
        for name, value in grads.items():
            assert_close(value, expected_grads[name], torch.float32, f"d{name}", floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_other_dtypes(backend, dtype, chunk_rows):
    hidden, weight, bias, target, grad, options = make((33, 24, 257), HEADS["all"], dtype)
    wide = [x.double() for x in (hidden, weight, bias)]
    names = ("hidden", "weight", "bias")
    expected, expected_grads = gradients(reference.linear_logp, *wide, target, grad, options, names)
    options |= {"chunk_rows": chunk_rows, "backend": backend}
    logp, grads = gradients(linear_logp, hidden, weight, bias, target, grad, options, names)
    # Log-probs of 16-bit inputs are float32 throughout: the logits are never rounded.
    assert_close(logp, expected, torch.float64 if dtype == torch.float64 else torch.float32, "logp")
    for name, value in grads.items():
        assert value.dtype == dtype
        assert_close(value, expected_grads[name], dtype, f"d{name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weights_get_both_gradients(backend):
    g = torch.Generator().manual_seed(1)
    table, mix = torch.randn(29, 12, generator=g), torch.randn(12, 12, generator=g)
    ids, target = torch.randint(29, (2, 9), generator=g)

    def run(dtype, fn, **options):
        leaf = table.to(dtype, copy=True).requires_grad_()
        fn(torch.tanh(leaf[ids] @ mix.to(dtype)), leaf, target, **options).sum().backward()
        return leaf.grad

    expected = run(torch.float64, reference.linear_logp)
    assert_close(run(torch.float32, linear_logp, backend=backend), expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapter_on_the_head(backend):
    """A LoRA on the head is the adapted weight; its factors get their gradients through it."""
    hidden, weight, _, target, grad, _ = make((7, 16, 11), {}, torch.float32)
    g = torch.Generator().manual_seed(2)
    factors = torch.randn(16, 3, generator=g), torch.randn(3, 11, generator=g)

    def run(dtype, fn, **options):
        a, b = (x.to(dtype, copy=True).requires_grad_() for x in factors)
        fn(hidden.to(dtype), weight.to(dtype) + (a @ b).T, target, **options).backward(grad.to(dtype))
        return a.grad, b.grad

    pairs = zip(
        run(torch.float32, linear_logp, backend=backend), run(torch.float64, reference.linear_logp), strict=True
    )
    for value, expected in pairs:
        assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(), ("a",), ("b",), ("weight", "a", "b")], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_without_the_adapted_weight(backend, trained, chunk_rows, dtype):
    """lora=(a, b, scaling) equals the head W + scaling * b a, with every gradient, also for frozen W."""
    hidden, weight, bias, target, grad, options = make((33, 24, 257), HEADS["all"], dtype)
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(5, 24, generator=g).to(dtype), torch.randn(257, 5, generator=g).to(dtype)

    def run(fn, dtype, **more):
        inputs = {"hidden": hidden, "weight": weight, "a": a, "b": b}
        leaves = {k: x.to(dtype, copy=True).requires_grad_(k in ("hidden", *trained)) for k, x in inputs.items()}
        lora = leaves["a"], leaves["b"], 0.3
        logp = fn(leaves["hidden"], leaves["weight"], target, bias=bias.to(dtype), lora=lora, **options, **more)
        logp.backward(grad.to(logp.dtype))
        return [logp.detach()], [leaves[k].grad for k in ("hidden", *trained)]

    logp, grads = run(linear_logp, dtype, backend=backend, chunk_rows=chunk_rows)
    expected, expected_grads = run(reference.linear_logp, torch.float64)
    assert_close(logp[0], expected[0], torch.float32)
    for value, exact in zip(grads, expected_grads, strict=True):
        assert_close(value, exact, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("vocab", [1031, 256])  # a tail after the kernels' blocks, and none
def test_16_bit_inputs_lose_nothing_but_their_gradients(backend, vocab):
    """bfloat16 inputs, rows from hopeless to certain: the log-probs are as good as float32 logits make them.

    On a GPU the float32 logits are its own, of the same inputs: tensor cores sum less exactly than IEEE float32 does.
    """
    device = DEVICE if backend == "triton" else "cpu"
    g = torch.Generator().manual_seed(5)
    num_rows = 256  # of equal scale, so that the errors' norms are those of their distributions, not of a few rows
    hidden = torch.randn(num_rows, 64, generator=g) * 2
    weight = torch.randn(vocab, 64, generator=g)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = hidden.double() @ weight.double().T
    drawn = torch.randint(vocab, (num_rows,), generator=g)
    target = torch.where(torch.arange(num_rows) % 3 == 0, drawn, logits.argmax(1))
    exact = reference.linear_logp(hidden.double(), weight.double(), target)
    assert (exact.exp() > 0.999).sum() >= 20 and (exact < -20).any()
    if device == "cuda":
        eager_logits = torch.mm(hidden.to(device), weight.T.to(device), out_dtype=torch.float32).cpu()
    else:
        eager_logits = hidden.float() @ weight.float().T
    eager = torch.log_softmax(eager_logits, -1).gather(1, target[:, None]).squeeze(1)
    leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight)]
    logp = linear_logp(*leaves, target.to(device), backend=backend)
    assert logp.max() <= 1e-6
    error, eager_error = logp.detach().cpu().double() - exact, eager.double() - exact
    assert error.norm() <= 1.1 * eager_error.norm()
    logp.sum().backward()
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    reference.linear_logp(*wide, target).sum().backward()
    for leaf, expected in zip(leaves, wide, strict=True):
        assert_close(leaf.grad.cpu(), expected.grad, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_are_exact_and_never_above_zero(backend):
    """Target logit and logsumexp come from one float32 value: logits of 200 in bfloat16 keep their log-prob."""
    hidden = (torch.eye(4) * 20).bfloat16()
    weight = torch.cat([torch.eye(4) * 10, torch.eye(4) * 9.9375]).bfloat16()
    target = torch.arange(4)
    logp = linear_logp(hidden, weight, target, backend=backend)
    expected = reference.linear_logp(hidden.double(), weight.double(), target)
    assert (logp <= 0).all()
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=2e-5)  # half a unit of float32 at 200 is 8e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_masks_a_token_and_nan_stays_nan(backend):
    weight, bias = torch.zeros(3, 2), torch.tensor([0.0, 0.0, float("-inf")])
    hidden, target = torch.zeros(1, 2), torch.tensor([0])
    logp = linear_logp(hidden, weight, target, bias=bias, backend=backend)
    assert logp.item() == pytest.approx(-torch.tensor(2.0).log().item(), rel=TOLERANCE[torch.float32])
    assert linear_logp(hidden + float("nan"), weight, target, backend=backend).isnan().all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_only_one_chunk_of_logits_lives(backend, trained):
    hidden, weight, _, target, grad, _ = make((64, 8, 1000), {}, torch.float32)
    head = Head(weight, None, None, None, 1.0, 1.0, None, backend)
    needs = Needs(True, trained, False, False, False)
    for chunk_rows, most in ((8, 8 * 1000), (64, 64 * 1000)):
        with LargestTensor() as seen:  # below the custom operator, which hides what it calls
            _, lse, _, d, _ = chunked.forward(head, hidden, target, chunk_rows, needs)
            chunked.backward(head, hidden, target, lse, d, grad, needs, chunk_rows)
        assert seen.elements == max(most, weight.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_16_bit_head_keeps_d_of_a_block(backend):
    """As many rows as make d twice the size of W: 48 in six chunks; of 49, none is kept."""
    for num_rows, kept in ((24, True), (48, True), (49, False)):
        hidden, weight, _, target, _, _ = make((num_rows, 24, 100), {}, torch.bfloat16)
        head = Head(weight, None, None, None, 1.0, 1.0, None, backend)
        with LargestTensor() as seen:
            logp, _, _, d, _ = chunked.forward(head, hidden, target, 8, Needs(True, True, False, False, False))
        assert (d is not None) == kept
        if d is not None:
            assert d.dtype == torch.bfloat16 and seen.elements == num_rows * 100
            y = hidden.double() @ weight.double().T
            exact = torch.nn.functional.one_hot(target, 100) - y.softmax(-1)
            assert_close(d, exact, torch.bfloat16)
            assert_close(logp, y.log_softmax(-1)[torch.arange(num_rows), target], torch.float32)


def test_no_rows():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    logp = linear_logp(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == (0,) and hidden.grad.shape == (0, 4) and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_twice_is_bit_equal(backend, dtype):
    *inputs, options = make((33, 24, 257), HEADS["all"], dtype)
    inputs = [x.to(DEVICE if backend == "triton" else "cpu") for x in inputs]
    names = ("hidden", "weight", "bias")
    runs = [gradients(linear_logp, *inputs, {**options, "backend": backend, "chunk_rows": 15}, names) for _ in range(2)]
    for name in names:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "hidden \\[N, H\\]"),
        ({"hidden": torch.zeros(3, 4).bfloat16()}, "one floating dtype"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, "int64 \\[3\\]"),
        ({"target": torch.tensor([0, 1, 6])}, "ids 0..6, the head has 6 rows"),
        ({"target": torch.tensor([0, -100, 1])}, "ids -100..1"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logp(**(inputs | change))


def test_double_backward_is_refused():
    hidden, weight, _, target, _, _ = make((3, 4, 6), {}, torch.float32)
    logp = linear_logp(hidden.requires_grad_(), weight, target)
    with pytest.raises(RuntimeError, match="linear_logp has no second derivative"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
@pytest.mark.parametrize("num_rows", [5, 200])  # 200 rows: the layout of wide chunks, kept for the backward
def test_compiles_whole(compiler, names, num_rows):
    *inputs, options = make((num_rows, 8, 40), HEADS["all"], torch.float32)
    expected, expected_grads = gradients(linear_logp, *inputs, options, names)
    torch.compiler.reset()
    logp, grads = gradients(torch.compile(linear_logp, fullgraph=True, backend=compiler), *inputs, options, names)
    assert_close(logp, expected, torch.float32)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], torch.float32)


@pytest.mark.parametrize(
    ("num_rows", "chunk_rows", "sizes"),
    [
        (0, 4, []),
        (4, 4, [4]),
        (10, 4, [3, 3, 4]),
        (4096, 1024, [1024] * 4),
        (2560, 1024, [768, 768, 1024]),
        (300, 128, [128, 128, 44]),
        (700, 384, [384, 316]),
    ],
)
def test_chunks_are_few_and_of_like_size(num_rows, chunk_rows, sizes):
    found = list(chunks(5, 5 + num_rows, chunk_rows))
    lengths = [part.stop - part.start for part in found]
    assert lengths == sizes
    assert [5, *(part.stop for part in found)][:-1] == [part.start for part in found]


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (2, 4096)])
def test_scaling_rounds_once_and_leaves_what_is_around(backend, dtype, shape):
    from macpo.kernels.linear_logp.triton_scale import scale

    g = torch.Generator().manual_seed(2)
    frame = torch.full((shape[0] + 2, shape[1]), float("nan"), dtype=dtype, device=DEVICE)
    x = frame[1:-1]
    x.copy_(torch.randn(shape, generator=g))
    factor = torch.tensor([1.0, 0.3, -2.7])[: shape[0]].to(DEVICE)
    expected = (x.float() * factor[:, None]).to(dtype)
    assert torch.equal(scale(x, factor, torch.empty_like(x)), expected)
    assert scale(x, factor, x).data_ptr() == x.data_ptr() and torch.equal(x, expected)
    assert frame[[0, -1]].isnan().all()


@pytest.mark.parametrize("needs", [(True, False, False, False, False), (True,) * 5, (False,) * 5], ids=str)
@pytest.mark.parametrize("chunk_rows", [3, 8])
def test_the_custom_operator_is_what_it_declares(needs, chunk_rows):
    hidden, weight, bias, target, _, _ = make((5, 4, 9), HEADS["all"], torch.float32)
    leaves = [x.requires_grad_(n) for x, n in zip(
        (hidden, weight, bias, torch.randn(2, 4), torch.randn(9, 2)), needs, strict=True)]  # fmt: skip
    args = (*leaves, target, 0.5, 1.0, None, chunk_rows, "torch", list(needs))
    torch.library.opcheck(torch.ops.macpo.linear_logp.default, args)


def test_default_chunks_are_whole_tiles_within_the_budget():
    assert default_chunk_rows(128_256, "cuda") == 512 and 4 * 512 * 128_256 + 2 * 4096 * 4096 < 0.30e9
    assert default_chunk_rows(128_256, "cuda", "epilogue") == 1024 and (2 + 4 / 256) * 1024 * 128_256 < 0.27e9
    assert default_chunk_rows(32_000, "cpu") == 256 and default_chunk_rows(10**9, "cpu") == 1
    assert default_chunk_rows(100_000, "cpu") == 83


def test_sequence_sums_do_not_depend_on_the_batch():
    logp = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 5
    cu = torch.tensor([0, 1, 400, 400, 1000], dtype=torch.int32)
    sums = sequence_sums(logp, cu)
    assert_close(sums, torch.stack([logp[a:b].double().sum() for a, b in pairwise(cu)]), torch.float32)
    alone = sequence_sums(logp[1:400], torch.tensor([0, 399], dtype=torch.int32))
    assert torch.equal(alone, sums[1:2])
