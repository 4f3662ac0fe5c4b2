"""The head operators over both of their products ("routes")."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, TRITON, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from macpo.kernels import linear_logp, pair_loss
from macpo.kernels.linear_logp import chunked, reference
from macpo.kernels.linear_logp.head import Head, Needs
from macpo.kernels.linear_logp.tuning import FASTER, route_of
from macpo.kernels.pair_loss import reference as pair_reference

pytestmark = pytest.mark.parametrize("backend", [TRITON])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("route", ["vendor", "epilogue"])
def test_both_routes_of_the_operators(backend, route, compiled):
    """Scoring, a frozen head and a trained one in chunks of 4 rows; the vendor's product or our own."""
    g = torch.Generator().manual_seed(4)
    tensors = [torch.randn(size, 16, generator=g).to(DEVICE) for size in (6, 40)]
    target, grad = torch.randint(40, (6,), generator=g).to(DEVICE), torch.randn(6, generator=g).to(DEVICE)

    def run(fn, inputs, trained, **more):
        leaves = [x.clone().requires_grad_(index in trained) for index, x in enumerate(inputs)]
        # the epilogue has no gradient of a softcap
        logp = fn(*leaves, target, logit_scale=0.5, softcap=None if trained else 4.0, **more)
        if trained:
            logp.backward(grad.to(logp.dtype))
        return [logp.detach(), *(leaves[index].grad for index in trained)]

    fn = torch.compile(linear_logp, fullgraph=True, backend="aot_eager") if compiled else linear_logp
    for trained in ((), (0,), (0, 1)):
        expected = run(reference.linear_logp, [x.double() for x in tensors], trained)
        got = run(fn, tensors, trained, backend=backend, route=route, chunk_rows=4)
        for value, right in zip(got, expected, strict=True):
            assert_close(value, right, torch.float32)
    cu_rows, refs = torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32), torch.zeros(4)
    losses = []
    for chosen in (route, "vendor"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = pair_loss(*leaves, target, cu_rows, refs, backend=backend, route=chosen, chunk_rows=4)
        out.loss.backward()
        losses.append([out.loss.detach(), *(x.grad for x in leaves)])
    for value, right in zip(*losses, strict=True):
        assert_close(value, right, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_rows", [4, 30])
def test_losses_by_the_epilogue(backend, dtype, trained, chunk_rows):
    """Loss, rewards and gradients against float64: several chunks, a pair longer than a chunk, and one block."""
    g = torch.Generator().manual_seed(8)
    hidden = torch.randn(17, 12, generator=g).to(DEVICE, dtype)
    weight = torch.randn(300, 12, generator=g).to(DEVICE, dtype)
    target = torch.randint(300, (17,), generator=g).to(DEVICE)
    cu_rows, refs = torch.tensor([0, 3, 5, 14, 17], dtype=torch.int32), torch.randn(4, generator=g) - 20

    def run(fn, dtype, **more):
        leaves = [hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_(trained)]
        loss = fn(*leaves, target, cu_rows, refs, beta=0.3, **more)
        loss = getattr(loss, "loss", loss)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves[: 1 + trained])]

    options = {"backend": backend, "route": "epilogue", "chunk_rows": chunk_rows}
    got = run(pair_loss, dtype, **options)
    names_and_dtypes = (("loss", torch.float32), ("dhidden", dtype), ("dweight", dtype))
    expected = run(pair_reference.pair_loss, torch.float64)
    for (name, precision), value, right in zip(names_and_dtypes, got, expected, strict=False):
        assert_close(value, right, precision, name)
    assert all(map(torch.equal, got, run(pair_loss, dtype, **options)))


def test_the_epilogue_keeps_no_logits(backend):
    """Bytes of the largest tensor that any operator returns while scoring."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel() * result.element_size())
            return result

    hidden, weight = torch.ones(70, 4, device=DEVICE).bfloat16(), torch.ones(300, 4, device=DEVICE).bfloat16()
    target = torch.zeros(70, dtype=torch.int64, device=DEVICE)
    sizes = []
    for route in ("epilogue", "vendor"):
        head = Head(weight, None, None, None, 1.0, 1.0, None, backend, route)
        with Largest() as seen:
            chunked.forward(head, hidden, target, 35, Needs(False, False, False, False, False))
        sizes.append(seen.size)
    # What repairs broken rows has three numbers for each 32 tokens of the vocabulary; the logits of a chunk are larger.
    repaired = 3 * -(-300 // 32) * 35 * 4
    assert sizes[0] <= repaired < 35 * 300 * 4 <= sizes[1]


def test_routes_are_refused_or_come_from_the_table(backend, monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    for route, at, dtype, options, message in (
        ("best", "triton", bf16, {}, "unknown route 'best'"),
        ("epilogue", "torch", bf16, {}, "the torch backend has none"),
        ("epilogue", "native", torch.float32, {}, "is for bfloat16 on a CPU with AVX512-BF16"),
        ("epilogue", "triton", torch.float64, {}, "the inputs float64"),
        ("epilogue", "triton", bf16, {"lora": True}, "a LoRA is added"),
        ("epilogue", "triton", bf16, {"softcap": True}, "slope of a softcap"),
        ("epilogue", "triton", torch.float16, {}, "float16 cannot hold"),
        ("epilogue", "triton", bf16, {"sharded": True}, "another process may have"),
        ("epilogue", "triton", bf16, {"contiguous": False}, "not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            route_of(route, at, cuda, dtype, score=False, **options)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert route_of(None, "triton", cuda, bf16, score=True) == "vendor"
    monkeypatch.setitem(FASTER, (7, "score"), "epilogue")
    assert route_of(None, "triton", cuda, bf16, score=True) == "epilogue"
    assert route_of(None, "triton", cuda, bf16, score=True, softcap=True) == "epilogue"
    assert route_of(None, "triton", cuda, torch.float32, score=True) == "vendor"
    assert route_of(None, "triton", cuda, bf16, score=False) == "vendor"
    assert route_of(None, "triton", cuda, bf16, score=True, lora=True) == "vendor"
    assert route_of(None, "triton", cuda, bf16, score=True, contiguous=False) == "vendor"
