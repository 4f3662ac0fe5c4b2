"""linear_logp and pair_loss over a vocabulary that is cut between processes, against float64 and the whole head."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pair_checks
import pytest
import torch
from kernel_checks import BACKENDS, DEVICE, TRITON, assert_close
from pair_checks import LENGTHS, LOSS_CASES, extra
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from macpo.kernels import VocabShard, linear_logp, pair_loss, sequence_sums
from macpo.kernels.linear_logp import reference, rows
from macpo.kernels.linear_logp.op import rows_of_chunk
from macpo.kernels.linear_logp.shard import ShardHead, Sums, join
from macpo.kernels.pair_loss import reference as pair_reference

ALL = [*BACKENDS, TRITON]
HEADS = {"plain": {}, "all": {"bias": True, "logit_scale": 1.5, "softcap": 3.0}, "lora": {"lora": 3}}
# Parts of one size; the smallest head; a last part that is smaller; parts of several vectors and tiles of lanes
CUTS = [(2, 5, 16, 12), (2, 1, 1, 2), (3, 33, 24, 257), (2, 5, 8, 1031)]
TRAINED = [(), ("hidden",), ("weight", "bias", "lora_b"), ("hidden", "weight", "bias", "lora_a", "lora_b")]
T_ = TypeVar("T_")
CUT = ("weight", "bias", "lora_b")  # inputs of which each process has its tokens' rows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# A vocabulary cut between processes, played by threads of which one computes at a time; all wait in an exchange.


def on_parts(size: int, vocab: int, body: Callable[[VocabShard], T_]) -> list[T_]:
    """What `body` returns for each part. An exchange that not all take part in raises BrokenBarrierError."""
    computes, barrier = threading.Lock(), threading.Barrier(size, timeout=20)
    sent: list[Tensor] = [torch.empty(0)] * size

    def exchange(rank: int, reduce: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        sent[rank] = x.detach().clone()
        computes.release()
        try:
            barrier.wait()
            assert all(other.shape == x.shape and other.dtype == x.dtype for other in sent)
            result = reduce(torch.stack(sent))
            barrier.wait()
        finally:
            computes.acquire()
        return result

    def total(parts: Tensor) -> Tensor:
        wide = torch.promote_types(parts.dtype, torch.float32)
        return parts.sum(dim=0, dtype=wide).to(parts.dtype)

    def run(rank: int) -> T_:
        with computes:
            try:
                return body(
                    VocabShard(
                        vocab,
                        rank,
                        size,
                        maximum=lambda x: exchange(rank, lambda parts: parts.amax(dim=0), x),
                        total=lambda x: exchange(rank, total, x),
                    )
                )
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def part_of(tensors: dict[str, Tensor], shard: VocabShard) -> dict[str, Tensor]:
    """One process's inputs."""
    own = slice(shard.first, shard.first + shard.count)
    return {name: x[own] if name in CUT else x for name, x in tensors.items()}


def assembled(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the whole inputs; of what every process has, theirs, which must be equal to the bit."""
    for name, grad in parts[0].items():
        assert name in CUT or all(torch.equal(part[name], grad) for part in parts), name
    return {name: torch.cat([part[name] for part in parts]) if name in CUT else grad for name, grad in parts[0].items()}


def make(cut, head, dtype):
    """Inputs by name, target, gradient of the log-probs, and the head's options."""
    _, num_rows, hidden_size, vocab = cut
    g = torch.Generator().manual_seed(0)
    tensors = {"hidden": torch.randn(num_rows, hidden_size, generator=g)}
    tensors["weight"] = torch.randn(vocab, hidden_size, generator=g)
    if head.get("bias"):
        tensors["bias"] = torch.randn(vocab, generator=g)
    if rank := head.get("lora"):
        tensors["lora_a"] = torch.randn(rank, hidden_size, generator=g) / 4
        tensors["lora_b"] = torch.randn(vocab, rank, generator=g)
    target, grad = torch.randint(vocab, (num_rows,), generator=g), torch.randn(num_rows, generator=g)
    options = {key: value for key, value in head.items() if key not in ("bias", "lora")}
    return {name: x.to(dtype) for name, x in tensors.items()}, target, grad, options


def logp_of(fn, tensors, target, grad, trained, **options):
    """Log-probs, and the gradients of the inputs that are trained, by name."""
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in tensors.items()}
    logp = fn(leaves["hidden"], leaves["weight"], target, **extra(leaves), **options)
    if logp.requires_grad:
        logp.backward(grad.to(logp.dtype))
    return logp.detach(), {name: leaves[name].grad for name in leaves if name in trained}


def logp_of_parts(parts, tensors, target, grad, trained, **options):
    device = DEVICE if options["backend"] == "triton" else "cpu"
    tensors = {name: x.to(device) for name, x in tensors.items()}
    on_device = target.to(device), grad.to(device)
    runs = on_parts(
        parts,
        tensors["weight"].shape[0],
        lambda shard: logp_of(linear_logp, part_of(tensors, shard), *on_device, trained, shard=shard, **options),
    )
    assert all(torch.equal(logp.nan_to_num(1.0), runs[0][0].nan_to_num(1.0)) for logp, _ in runs)
    return runs[0][0].cpu(), {name: x.cpu() for name, x in assembled([grads for _, grads in runs]).items()}


def check_logp(backend, cut, head, dtype, trained, **options):
    tensors, target, grad, scalars = make(cut, head, dtype)
    wide = {name: x.double() for name, x in tensors.items()}
    expected, expected_grads = logp_of(reference.linear_logp, wide, target, grad, trained, **scalars)
    logp, grads = logp_of_parts(cut[0], tensors, target, grad, trained, backend=backend, **scalars, **options)
    floor = 1.0 if cut[1] == 1 else 0.0  # a single row may be confident
    assert_close(logp, expected, torch.promote_types(torch.float32, dtype), "logp", floor)
    assert set(grads) == set(expected_grads)
    for name, value in grads.items():
        assert value.dtype == dtype
        assert_close(value, expected_grads[name], dtype, f"d{name}", floor)


# One element; one past a block of 1024 tokens; over two chunks of lanes and rows past a tile; two splits of a row
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 1025), (33, 1040), (3, 5000)], ids=str)
@pytest.mark.parametrize(("with_bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, 5.0)])
def test_partial_sums_of_rows(backend, sizes, with_bias, scale, softcap):
    """The target is left out, not taken off: where it is certain, what is left keeps its digits."""
    g = torch.Generator().manual_seed(7)
    z, bias = 4 * torch.randn(sizes, generator=g), torch.randn(sizes[1], generator=g) if with_bias else None
    target = torch.randint(sizes[1], sizes[:1], generator=g)
    z[0, target[0]] = 40.0
    logits = (z.double() + (0 if bias is None else bias.double())) * scale
    y = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    hit, top = y.gather(1, target[:, None]).squeeze(1), y.amax(dim=1)
    expected = top, (y - top[:, None]).exp().scatter(1, target[:, None], 0.0).sum(dim=1), hit
    device = DEVICE if backend == "triton" else "cpu"
    for lanes in (False, True) if backend == "native" else (False,):
        given = z.T.contiguous().T if lanes else z.clone()
        options = (None if bias is None else bias.to(device)), scale, softcap
        z_nv = given.to(device)
        found = rows.kernels(z_nv, backend).row_partials(z_nv, target.to(device), *options)
        assert torch.equal(given, z)
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value.cpu().double(), right, rtol=5e-6, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [None, 4], ids=lambda c: f"chunk{c}")
def test_log_probs_and_gradients_equal_float64(backend, cut, head, chunk_rows):
    for trained in TRAINED:
        check_logp(backend, cut, HEADS[head], torch.float32, trained, chunk_rows=chunk_rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(backend, dtype):
    for chunk_rows in (None, 15):
        for trained in TRAINED:
            check_logp(backend, (3, 33, 24, 257), HEADS["all"], dtype, trained, chunk_rows=chunk_rows)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_row_kernels_of_triton(backend, dtype):
    """Few cases, as the interpreter is slow."""
    for trained in TRAINED[::3]:
        check_logp(backend, (2, 17, 24, 300), HEADS["all"], dtype, trained, chunk_rows=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_rounding_is_lost(backend):
    """bfloat16 rows from hopeless to certain: as good as float32 logits make them, and 1 - p to its own digits."""
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(256, 64, generator=g) * 2).bfloat16(), torch.randn(1031, 64, generator=g).bfloat16()
    logits = hidden.double() @ weight.double().T
    drawn = torch.randint(1031, (256,), generator=g)
    target = torch.where(torch.arange(256) % 3 == 0, drawn, logits.argmax(1))
    exact = reference.linear_logp(hidden.double(), weight.double(), target)
    assert (exact.exp() > 0.999).sum() >= 20 and (exact < -20).any()
    eager = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    tensors = {"hidden": hidden, "weight": weight}
    logp, _ = logp_of_parts(3, tensors, target, torch.ones(256), (), backend=backend)
    assert (logp.double() - exact).norm() <= 1.1 * (eager.double() - exact).norm()
    assert (logp <= 0).all()
    # logits are rounded to half a unit of 64 at most: 4e-6 each of two, relative to 1 - p
    sure = exact.exp() > 0.999
    torch.testing.assert_close(logp[sure].double(), exact[sure], rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("size", [20.0, 60.0])
def test_a_certain_row_keeps_its_small_gradient(backend, size):
    """1 - p = 6e-9 and 3e-26 are sums over both parts; 1 minus a float32 p, or a float64 one, would be 0."""
    tensors = {"hidden": torch.eye(2), "weight": torch.tensor([[size, 0.0], [0.0, size], [0.0, 0.0], [0.0, 0.0]])}
    target, trained = torch.tensor([0, 1]), ("hidden", "weight")
    logp, grads = logp_of_parts(2, tensors, target, torch.ones(2), trained, backend=backend, chunk_rows=2)
    others = 3 * math.exp(-size)  # to 1 for the target
    missing = others / (1 + others)
    assert logp.tolist() == pytest.approx([-math.log1p(others)] * 2, rel=1e-6, abs=0)
    assert grads["weight"].diagonal().tolist() == pytest.approx([missing] * 2, rel=1e-6, abs=0)
    assert grads["hidden"].diagonal().tolist() == pytest.approx([missing * size] * 2, rel=1e-6, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_one_part_masked_tokens_and_nan(backend):
    g = torch.Generator().manual_seed(3)
    tensors = {"hidden": torch.randn(6, 8, generator=g), "weight": torch.randn(10, 8, generator=g)}
    tensors["bias"] = torch.zeros(10)
    wide = {name: x.double() for name, x in tensors.items()}
    for low in (0, 5):  # all targets on one part; the other's tokens may all be masked
        target, trained = torch.randint(low, low + 5, (6,), generator=g), ("hidden", "weight")
        for masked in (slice(0, 0), slice(5 - low, 10 - low)):
            for each in (tensors, wide):
                each["bias"] = torch.zeros_like(each["bias"])
                each["bias"][masked] = float("-inf")
            expected, expected_grads = logp_of(reference.linear_logp, wide, target, torch.ones(6), trained)
            logp, grads = logp_of_parts(2, tensors, target, torch.ones(6), trained, backend=backend)
            assert_close(logp, expected, torch.float32)
            for name in trained:
                assert_close(grads[name], expected_grads[name], torch.float32, name)
    tensors["bias"][7] = float("nan")
    assert logp_of_parts(2, tensors, target, torch.ones(6), (), backend=backend)[0].isnan().all()
    tensors["bias"][:] = float("-inf")
    assert logp_of_parts(2, tensors, target, torch.ones(6), (), backend=backend)[0].isnan().all()


def test_a_target_that_is_no_token_is_seen():
    """On the CPU by name; on a GPU, where nobody reads it, as NaN."""
    tensors = {"hidden": torch.ones(3, 2), "weight": torch.ones(5, 2)}
    with pytest.raises(ValueError, match="ids 0\\.\\.5, the head has 5 rows"):
        logp_of_parts(2, tensors, torch.tensor([0, 5, 1]), torch.ones(3), (), backend="torch")

    def joined(shard):
        here = shard.local(torch.tensor([0, 5, -1]))
        return join(shard, Sums(torch.zeros(3), torch.ones(3), torch.zeros(3)), here)[0]

    for logp in on_parts(2, 5, joined):
        assert logp.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_every_loss_equals_float64(backend, case):
    """Frozen and trained heads, in one block, in chunks of 4, and in chunks that no pair fits."""
    options = LOSS_CASES[case] | {"beta": 0.3, "sft_weight": 0.5, "num_pairs": 4}
    for lengths in LENGTHS:
        for head in pair_checks.HEADS.values() if case in ("sigmoid", "orpo") else [pair_checks.HEADS["all"]]:
            tensors, target, cu, refs, scalars = pair_checks.make(lengths, head, loss=options["loss"])
            wide = {name: x.double() for name, x in tensors.items()}
            for trained in (("hidden",), tuple(tensors)):
                expected, expected_grads = pair_checks.run(
                    pair_reference.pair_loss, wide, target, cu, refs, trained=trained, **scalars, **options
                )
                for chunk_rows in (None, 4, 2):
                    more = {**scalars, **options, "backend": backend, "chunk_rows": chunk_rows}
                    loss, grads = pair_of_parts(2, tensors, target, cu, refs, trained, more)
                    assert_close(loss, expected, torch.float32, "loss")
                    for name, value in grads.items():
                        assert_close(value, expected_grads[name], torch.float32, f"d{name}", 0.01)


def pair_of_parts(parts, tensors, target, cu, refs, trained, options):
    device = DEVICE if options["backend"] == "triton" else "cpu"
    tensors, target = {name: x.to(device) for name, x in tensors.items()}, target.to(device)
    runs = on_parts(
        parts,
        tensors["weight"].shape[0],
        lambda shard: pair_checks.run(
            pair_loss, part_of(tensors, shard), target, cu, refs, trained=trained, shard=shard, **options
        ),
    )
    assert all(torch.equal(loss, runs[0][0]) for loss, _ in runs)
    return runs[0][0].cpu(), {name: x.cpu() for name, x in assembled([grads for _, grads in runs]).items()}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_that_is_its_own_reference_loses_ln_2_twice_the_same(backend, dtype):
    lengths = (2, 1) if backend == "triton" else LENGTHS[1]  # under the interpreter the others take 10 s
    tensors, target, cu, _, scalars = pair_checks.make(lengths, pair_checks.HEADS["all"], dtype, vocab=29)
    logp, _ = logp_of_parts(3, tensors, target, torch.ones(len(target)), (), backend=backend, **scalars)
    refs = sequence_sums(logp, cu)
    more = {**scalars, "backend": backend, "chunk_rows": 5 if len(target) > 5 else 2}
    first, second = (pair_of_parts(3, tensors, target, cu, refs, tuple(tensors), more) for _ in range(2))
    assert first[0].item() == pytest.approx(math.log(2), abs=1e-7)
    assert all(torch.equal(first[1][name], second[1][name]) for name in tensors)


@pytest.mark.parametrize(("trained", "products"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3)])
def test_each_process_does_its_share_of_the_products(trained, products):
    tensors, target, cu, refs, _ = pair_checks.make(LENGTHS[1], {}, vocab=30)

    def flops(shard):
        with FlopCounterMode(display=False) as counter:
            leaves = {name: x.requires_grad_(name in trained) for name, x in part_of(tensors, shard).items()}
            out = pair_loss(**leaves, target=target, cu_rows=cu, ref_logps=refs, backend="torch", shard=shard)
            if trained:
                out.loss.backward()
        return counter.get_total_flops()

    whole = 2 * tensors["hidden"].numel() * 30
    assert on_parts(3, 30, flops) == [products * whole // 3] * 3


def test_compilation_runs_it_between_two_graphs_or_not_at_all():
    tensors, target, grad, _ = make((2, 5, 8, 40), {}, torch.float32)
    alone = VocabShard(40, 0, 1, maximum=torch.clone, total=torch.clone)

    def double(hidden, weight, target, **options):
        return 2 * linear_logp(2 * hidden, weight, target, shard=alone, backend="torch")

    expected = logp_of(double, tensors, target, grad, ("hidden", "weight"))
    torch.compiler.reset()
    found = logp_of(torch.compile(double, backend="aot_eager"), tensors, target, grad, ("hidden", "weight"))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logp_of(torch.compile(double, backend="aot_eager", fullgraph=True), tensors, target, grad, ("hidden",))
    torch.compiler.reset()


def test_processes_agree_on_the_chunks():
    """The last part is smaller: with chunks of its own size it would exchange other rows than the others."""
    shards = [VocabShard(262_145, rank, 4, maximum=torch.clone, total=torch.clone) for rank in range(4)]
    weights = [torch.empty(shard.count, 1) for shard in shards]
    parts = list(zip(weights, shards, strict=True))
    assert len({rows_of_chunk(None, weight, "vendor", shard) for weight, shard in parts}) == 1
    assert len({rows_of_chunk(None, weight, "vendor") for weight in weights}) == 2


def test_what_does_not_fit_is_named():
    shard = VocabShard(7, 1, 2, maximum=torch.clone, total=torch.clone)
    assert (shard.first, shard.count) == (4, 3)
    hidden, weight, target = torch.zeros(2, 4), torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="part 1 of 2 of 7 tokens has 3, weight 4"):
        linear_logp(hidden, weight, target, shard=shard)
    with pytest.raises(ValueError, match="5 tokens cut into 4 parts of 2 leave one without any"):
        VocabShard(5, 3, 4, maximum=torch.clone, total=torch.clone)
    logp = linear_logp(hidden.requires_grad_(), weight[:3], target, shard=shard)
    with pytest.raises(RuntimeError, match="linear_logp has no second derivative"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    assert ShardHead.__slots__ == ("shard",)
