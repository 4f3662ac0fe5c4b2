"""pair_loss: values and every gradient against float64 on every route, batches, memory, torch.compile."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import BACKENDS, DEVICE, TRITON, assert_close
from pair_checks import HEADS, LENGTHS, LOSS_CASES, extra, make, run

from macpo.kernels import linear_logp, native, pair_loss, sequence_sums
from macpo.kernels.linear_logp import head as head_module
from macpo.kernels.linear_logp import rows
from macpo.kernels.pair_loss import reference
from macpo.kernels.transfer import filled

# Where gradients go: a frozen head, a trained one, everything, and a LoRA beside frozen weights.
TRAINED = [("hidden",), ("weight", "bias"), ("hidden", "lora_a", "lora_b"), ("hidden", "weight", "bias", "lora_b")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sft_weight", [0.0, 0.2])
def test_values_and_gradients_equal_float64(backend, case, lengths, head, sft_weight):
    settings = {**LOSS_CASES[case], "sft_weight": sft_weight, "beta": 0.3}
    tensors, target, cu, ref_logps, options = make(lengths, HEADS[head], loss=settings["loss"])
    options |= settings
    wide = {name: x.double() for name, x in tensors.items()}
    expected, expected_grads = run(reference.pair_loss, wide, target, cu, ref_logps, trained=tensors, **options)
    floor = 0.1  # a met hinge has no gradient; the log-ratios are such that no other loss is near its minimum
    for trained in TRAINED:
        if not set(trained) & set(tensors):
            continue
        for chunk_rows in (None, 9, 4):  # all pairs in one chunk; chunks of one pair and two; the longest pair in parts
            chosen = {**options, "backend": backend, "chunk_rows": chunk_rows}
            value, grads = run(pair_loss, tensors, target, cu, ref_logps, trained=trained, **chosen)
            assert_close(value, expected, torch.float32, "loss", floor)
            for name, grad in grads.items():
                assert_close(grad, expected_grads[name], torch.float32, f"d{name}", floor)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_dtypes(backend, dtype, chunk_rows):
    if backend == "native" and dtype == torch.bfloat16 and not native.has_bf16_gemm():
        pytest.skip("this CPU has no AVX512-BF16; the torch GEMMs are checked with backend torch")
    device = DEVICE if backend == "triton" else "cpu"
    tensors, target, cu, ref_logps, options = make((3, 7, 1, 4, 6, 2), HEADS["all"], dtype, 24, 130)
    wide = {name: x.double() for name, x in tensors.items()}
    expected, expected_grads = run(reference.pair_loss, wide, target, cu, ref_logps, trained=tensors, **options)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    options |= {"backend": backend, "chunk_rows": chunk_rows}
    for trained in (("hidden",), tuple(tensors)):
        value, grads = run(pair_loss, tensors, target.to(device), cu, ref_logps.to(device), trained=trained, **options)
        assert_close(value.cpu(), expected, torch.float32, "loss")
        for name, grad in grads.items():
            assert grad.dtype == dtype
            assert_close(grad.cpu(), expected_grads[name], dtype, f"d{name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_gradients_below_its_smallest_number(backend):
    """One pair of 2 ** 16: g is about 1e-6, whose products with hidden would be subnormal; the upstream gradient of a
    loss scaler comes after."""
    tensors, target, cu, ref_logps, _ = make((3, 4), {}, torch.float16)
    wide = {name: x.double() for name, x in tensors.items()}
    scale = 2.0**16

    def scaled(fn, **options):
        return lambda *args, **kw: fn(*args, num_pairs=2**16, beta=0.1, **options, **kw)

    def loss(fn, **options):
        def total(*args, **kw):
            out = scaled(fn, **options)(*args, **kw)
            return (out if isinstance(out, torch.Tensor) else out.loss) * scale

        return total

    _, expected = run(loss(reference.pair_loss), wide, target, cu, ref_logps, trained=tensors)
    _, grads = run(loss(pair_loss, backend=backend), tensors, target, cu, ref_logps, trained=tensors)
    for name, grad in grads.items():
        # d and g h are rounded to float16 besides the result: three roundings of half a unit, in quadrature 1.7 of it.
        assert_close(grad, expected[name], torch.float16, f"d{name}")


def test_reference_free_tied_and_adapted_weights():
    tensors, target, cu, _, _ = make((3, 2, 4, 1), {})
    ids = torch.randint(19, target.shape, generator=torch.Generator().manual_seed(1))

    def tied(fn, dtype):
        table = tensors["weight"].to(dtype, copy=True).requires_grad_()
        a, b = (torch.randn(*s, generator=torch.Generator().manual_seed(2)).to(dtype) for s in ((19, 2), (2, 6)))
        a.requires_grad_()
        out = fn(torch.tanh(table[ids]), table + a @ b, target, cu, None, beta=0.2)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()
        return table.grad, a.grad

    for value, expected in zip(tied(pair_loss, torch.float32), tied(reference.pair_loss, torch.float64), strict=True):
        assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_micro_batches_sum_to_the_big_batch(backend, case):
    lengths = (3, 7, 1, 4, 6, 2)
    options = {**LOSS_CASES[case], "sft_weight": 0.2, "backend": backend}
    tensors, target, cu, ref_logps, _ = make(lengths, {}, loss=options["loss"])
    whole, whole_grads = run(pair_loss, tensors, target, cu, ref_logps, trained=tensors, **options)
    total, grads = 0.0, {"hidden": [], "weight": []}
    for first in (0, 2, 4):
        part_rows = slice(int(cu[first]), int(cu[first + 2]))
        part = {"hidden": tensors["hidden"][part_rows], "weight": tensors["weight"]}
        ref = None if ref_logps is None else ref_logps[first : first + 2]
        args = (target[part_rows], cu[first : first + 3] - cu[first], ref)
        value, part_grads = run(pair_loss, part, *args, trained=part, num_pairs=3, **options)
        total = total + value
        for name, grad in part_grads.items():
            grads[name].append(grad)
    assert_close(total, whole, torch.float32)
    assert_close(torch.cat(grads["hidden"]), whole_grads["hidden"], torch.float32)
    assert_close(sum(grads["weight"]), whole_grads["weight"], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_of_dpo_gives_ln_2(backend):
    """Reference and policy through the same operator: the log-ratio is exactly 0, whatever the log-probs' size."""
    tensors, target, cu, _, _ = make((400, 300, 1, 200), {}, vocab=997)
    hidden = tensors["hidden"] * 4
    with torch.no_grad():
        ref = sequence_sums(linear_logp(hidden, tensors["weight"], target, backend=backend), cu)
    assert ref.abs().max() > 1000
    out = pair_loss(hidden.requires_grad_(), tensors["weight"], target, cu, ref, backend=backend)
    assert abs(out.loss.item() - math.log(2)) < 1e-6
    assert out.margin.item() == 0.0 and (out.chosen_rewards == 0).all()


def test_only_the_loss_carries_gradient_and_metrics_are_what_they_say():
    tensors, target, cu, ref_logps, _ = make((3, 7, 1, 4, 6, 2), {})
    out = pair_loss(
        tensors["hidden"].requires_grad_(), tensors["weight"], target, cu, ref_logps, beta=0.5, sft_weight=2.0
    )
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]
    logp = linear_logp(tensors["hidden"], tensors["weight"], target).detach()
    sums = sequence_sums(logp, cu)
    assert torch.equal(out.chosen_logps, sums[0::2]) and torch.equal(out.rejected_logps, sums[1::2])
    assert torch.equal(out.chosen_rewards, 0.5 * (sums - ref_logps)[0::2])
    assert torch.equal(out.rejected_rewards, 0.5 * (sums - ref_logps)[1::2])
    margin = out.chosen_rewards - out.rejected_rewards
    assert out.accuracy.item() == pytest.approx((margin > 0).float().mean().item())
    assert out.margin.item() == pytest.approx(margin.mean().item())
    chosen_means = [logp[cu[i] : cu[i + 1]].mean() for i in (0, 2, 4)]
    assert out.sft_loss.item() == pytest.approx(-sum(chosen_means).item() / 3, rel=1e-6)
    assert out.loss.item() == pytest.approx((-F.logsigmoid(margin).mean() + 2.0 * out.sft_loss).item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("trained", "chunk_rows", "gemms"), [
    ((), 8, {"logits": 4}),
    (("hidden",), 8, {"logits": 4, "dx": 4}),
    (("hidden", "weight"), 64, {"logits": 1, "dx": 1, "dw": 1}),  # 3u: two chunks' worth of pairs would do as well
    (("hidden", "weight"), 16, {"logits": 2, "dx": 2, "dw": 2}),
    (("hidden", "weight"), 8, {"logits": 8, "dx": 4, "dw": 4}),  # pairs of 16 rows in two chunks each: 4u
    (("hidden", "lora_a"), 16, {"logits": 2, "dx": 2}),  # a LoRA beside frozen weights: 2u
])  # fmt: skip
def test_gemms_are_counted(backend, trained, chunk_rows, gemms, monkeypatch):
    """No product with the vocabulary is computed twice, or for an input that takes no gradient."""
    tensors, target, cu, ref_logps, _ = make((8, 8, 8, 8), HEADS["lora"])
    seen = []

    def spy(name, fn):
        return lambda *args, **kw: seen.append(name) or fn(*args, **kw)

    monkeypatch.setattr(head_module, "product_", spy("logits", head_module.product_))
    module = rows.kernels(tensors["hidden"], backend)
    kernels = {name: getattr(module, name) for name in ("row_logp", "row_logp_dlogits_", "row_dlogits_")}
    spies = SimpleNamespace(**{name: spy(name, fn) for name, fn in kernels.items()})
    monkeypatch.setattr(rows, "kernels", lambda *_: spies)
    mm, add = torch.mm, head_module.add_product_
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: (a.shape[1] == 19 and seen.append("dx")) or mm(a, b, **kw))

    def add_product_(out, d, x, *args, **kw):
        if out.shape == (19, 6):
            out.fill_(math.nan) if kw["overwrite"] else None  # dW is not filled before its first product
            seen.append("dw")
        return add(out, d, x, *args, **kw)

    monkeypatch.setattr(head_module, "add_product_", add_product_)
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in tensors.items()}
    out = pair_loss(
        leaves["hidden"],
        leaves["weight"],
        target,
        cu,
        ref_logps,
        **extra(leaves),
        chunk_rows=chunk_rows,
        backend=backend,
    )
    if trained:
        out.loss.backward()
    assert {name: seen.count(name) for name in ("logits", "dx", "dw") if name in seen} == gemms
    assert len([name for name in seen if name in kernels]) == gemms["logits"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths", "chunk_rows", "logits"), [
    ((8, 8, 8, 8), 8, 4),  # pairs longer than a chunk, in a block of 32 rows: each chunk's logits once
    ((36, 40, 4, 4), 8, 2 * 10 + 1),  # a pair longer than the block: its logits twice
    ((30, 6, 12, 16), 8, 8),  # all rows fit into a block of twice that size
])  # fmt: skip
def test_blocks_of_a_16_bit_head(backend, lengths, chunk_rows, logits, monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), 32, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(57, 32, generator=g).bfloat16().requires_grad_()
    target = torch.randint(57, (sum(lengths),), generator=g)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ref_logps = torch.randn(len(lengths), generator=g) - 20
    seen = []
    forward = head_module.Head.logits
    monkeypatch.setattr(head_module.Head, "logits", lambda *args: seen.append(0) or forward(*args))
    options = {"chunk_rows": chunk_rows, "backend": backend, "route": "vendor"}
    pair_loss(hidden, weight, target, cu, ref_logps, **options).loss.backward()
    assert len(seen) == logits
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    reference.pair_loss(*exact, target, cu, ref_logps.double()).backward()
    for x, y in zip((hidden, weight), exact, strict=True):
        assert_close(x.grad, y.grad, torch.bfloat16)


def test_backward_again_after_retain_graph_gives_the_same():
    """The gradients of the head are scaled in place only where nobody needs them again."""
    tensors, target, cu, ref_logps, _ = make((3, 7, 1, 4, 6, 2), HEADS["all"])
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    loss = 3.0 * pair_loss(leaves["hidden"], leaves["weight"], target, cu, ref_logps, **extra(leaves)).loss
    runs = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=keep) for keep in (True, True, False)]
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    _, plain = run(pair_loss, tensors, target, cu, ref_logps, trained=tensors)
    for one, grad in zip(runs[0], plain.values(), strict=True):
        assert_close(one, 3.0 * grad, torch.float32)


def test_the_gradient_of_the_weight_exists_once():
    tensors, target, cu, ref_logps, _ = make((3, 7), {})
    weight = tensors["weight"].requires_grad_()
    loss = pair_loss(tensors["hidden"], weight, target, cu, ref_logps).loss
    kept = loss.grad_fn.saved_tensors[3]
    assert kept.shape == weight.shape
    address = kept.data_ptr()
    del kept
    loss.backward()
    assert weight.grad.data_ptr() == address


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_backward_twice_is_bit_equal(backend):
    tensors, target, cu, ref_logps, options = make((3, 7, 1, 4, 6, 2), HEADS["all"], torch.bfloat16, 24, 130)
    device = DEVICE if backend == "triton" else "cpu"
    tensors = {name: x.to(device) for name, x in tensors.items()}
    options |= {"backend": backend, "chunk_rows": 8}
    args = target.to(device), cu, ref_logps.to(device)
    first, second = (run(pair_loss, tensors, *args, trained=tensors, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for name, grad in first[1].items():
        assert torch.equal(grad, second[1][name])


def test_double_backward_is_refused():
    tensors, target, cu, ref_logps, _ = make((3, 7), {})
    hidden = tensors["hidden"].requires_grad_()
    loss = pair_loss(hidden, tensors["weight"], target, cu, ref_logps).loss
    with pytest.raises(RuntimeError, match="pair_loss has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_compiles_whole(compiler, trained):
    tensors, target, cu, ref_logps, options = make((3, 7, 1, 4, 6, 2), HEADS["all"])
    options |= {"sft_weight": 0.2, "chunk_rows": 8}

    def training_loss(hidden, weight, *args, **kw):
        out = pair_loss(torch.tanh(hidden), weight, *args, **kw)
        return 2.0 * out.loss + out.margin

    expected, expected_grads = run(training_loss, tensors, target, cu, ref_logps, trained=trained, **options)
    torch.compiler.reset()
    compiled = torch.compile(training_loss, fullgraph=True, backend=compiler)
    value, grads = run(compiled, tensors, target, cu, ref_logps, trained=trained, **options)
    assert_close(value, expected, torch.float32)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], torch.float32)


@pytest.mark.parametrize("needs", [(True, False, False, False, False), (True, True, True, True, True), (False,) * 5])
def test_the_custom_operator_is_what_it_declares(needs):
    tensors, target, cu, ref_logps, _ = make((3, 2), HEADS["lora"])
    tensors["bias"] = torch.zeros(19)
    leaves = [tensors[name].requires_grad_(need) for name, need in zip(
        ("hidden", "weight", "bias", "lora_a", "lora_b"), needs, strict=True)]  # fmt: skip
    loss = ("sigmoid", 0.1, 0.0, None, None, 0.5, 1)
    args = (*leaves, target, cu, ref_logps, *loss, 0.7, 1.0, None, 8, "torch", list(needs))
    torch.library.opcheck(torch.ops.macpo.pair_loss.default, args)


def test_values_filled_by_kernels_are_those_copied():
    """What a CUDA graph's capture uses instead of a copy from the host."""
    for x in (torch.tensor([3, 3, 1, 7, 7, 7]), torch.tensor([1.0, 1.0, 0.25]), torch.tensor([5])):
        assert torch.equal(filled(x, torch.device("cpu")), x)
