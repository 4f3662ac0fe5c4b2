"""What only a GPU can show of the operators: CUDA graphs, Inductor, tensors of more than 2^31 elements, real sizes.

The other tests of the operators run there too, with real Triton in place of its interpreter.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import TRITON, assert_close

from macpo.kernels import SampleParams, Segments, linear_logp, paged_attention, pair_loss, prefix_attention, sample
from macpo.kernels.linear_logp import reference as head_reference
from macpo.kernels.paged_attention import reference as decode_reference

pytestmark = [*TRITON.marks, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def made(*shape, scale=1.0, seed=0):
    g = torch.Generator(CUDA).manual_seed(seed)
    return (torch.randn(*shape, generator=g, device=CUDA) * scale).to(BF16)


def losses(trained):
    """A call of pair_loss and its gradients; inputs of 300 rows in three pairs, and a head of 5,000 tokens."""
    hidden, weight = made(300, 256).requires_grad_(), made(5000, 256, scale=0.1, seed=1).requires_grad_(trained)
    target = torch.arange(300, device=CUDA) * 16
    cu_rows, refs = torch.tensor([0, 40, 90, 130, 200, 290, 300], dtype=torch.int32), torch.zeros(6, device=CUDA)

    def call():
        out = pair_loss(hidden, weight, target, cu_rows, refs, chunk_rows=128)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight] if trained else [hidden])]

    return call


def scoring():
    hidden, weight = made(300, 256), made(5000, 256, scale=0.1, seed=1)
    target = torch.arange(300, device=CUDA) * 16
    return lambda: [linear_logp(hidden, weight, target)]


def attention():
    segments = Segments.from_lengths([(150, [40, 60]), (70, [30, 20])]).to(CUDA)
    q, k, v, grad = (made(segments.num_tokens, heads, 64, seed=heads).requires_grad_() for heads in (8, 2, 2, 8))

    def call():
        out = prefix_attention(q, k, v, segments)
        return [out.detach(), *torch.autograd.grad(out, [q, k, v], grad.detach())]

    return call


def decoding():
    pools = [made(64, 32, 2, 128, seed=seed) for seed in (1, 2)]
    table = torch.randperm(64, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0)).int().view(8, 8)
    lens = torch.tensor([1, 32, 33, 100, 150, 200, 255, 256], dtype=torch.int32, device=CUDA)
    q = made(8, 8, 128)
    return lambda: [paged_attention(q, *pools, table, lens)]


def drawing(setting):
    logits = made(16, 32000, scale=3.0).float()
    params = SampleParams(3, **setting, batch=16, device=CUDA)
    keys = torch.stack([torch.arange(16), torch.zeros(16).long(), torch.zeros(16).long()], 1).to(CUDA)
    return lambda: list(sample(logits, params, keys, torch.arange(16, device=CUDA)))


CALLS = {
    "frozen": lambda: losses(False),
    "trained": lambda: losses(True),
    "score": scoring,
    "prefix": attention,
    "decode": decoding,
    "sample": lambda: drawing({"temperature": 0.9}),
    "sample filtered": lambda: drawing({"temperature": 0.9, "top_k": 50, "top_p": 0.7}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_cuda_graph_replays_what_eager_computes(name):
    call = CALLS[name]()
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("name", CALLS)
def test_twice_gives_the_same_bits(name):
    call = CALLS[name]()
    assert all(map(torch.equal, call(), call()))


@pytest.mark.parametrize("route", ["vendor", "epilogue"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_real_head_equals_float64(route, trained):
    """Rows of a vocabulary of 128 Ki in several chunks, confident ones among them."""
    num_rows, width, vocab = 700, 1024, 128_256
    hidden, weight = made(num_rows, width), made(vocab, width, scale=0.06, seed=1)
    target = torch.randint(vocab, (num_rows,), device=CUDA, generator=torch.Generator(CUDA).manual_seed(2))
    hidden[::2] = weight[target[::2]] * 8  # logits of about 30 for the target
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    grad = made(num_rows, seed=3).float()
    logp = linear_logp(*leaves, target, route=route, chunk_rows=256)
    logp.backward(grad)
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    expected = head_reference.linear_logp(*wide, target)
    expected.backward(grad.double())
    assert_close(logp, expected, torch.float32)
    for leaf, right in zip(leaves[: 1 + trained], wide, strict=False):
        assert_close(leaf.grad, right.grad, BF16)


@pytest.mark.parametrize("route", ["vendor", "epilogue"])
def test_logits_of_more_than_two_to_the_31(route):
    """17,000 rows of 128 Ki tokens in one chunk: the last rows equal those of a call of their own."""
    hidden, weight = made(17_000, 64), made(128_256, 64, scale=0.2, seed=1)
    target = torch.arange(17_000, device=CUDA) * 7
    whole, part = (hidden[rows].clone().requires_grad_() for rows in (slice(None), slice(-256, None)))
    logps = [linear_logp(whole, weight, target, route=route, chunk_rows=17_000)]
    logps.append(linear_logp(part, weight, target[-256:], route=route, chunk_rows=256))
    for logp in logps:
        logp.sum().backward()
    torch.testing.assert_close(logps[0][-256:], logps[1], rtol=1e-5, atol=1e-5)
    assert_close(whole.grad[-256:], part.grad.double(), BF16)


def test_a_pool_of_more_than_two_to_the_31():
    """Blocks at the far end of a pool of 2^32 bytes a side and more."""
    blocks = 2**31 // (32 * 8 * 128) + 64
    pools = [torch.zeros(blocks, 32, 8, 128, dtype=BF16, device=CUDA) for _ in range(2)]
    table = torch.arange(blocks - 16, blocks, dtype=torch.int32, device=CUDA).view(2, 8)
    for seed, pool in enumerate(pools):
        pool[-16:] = made(16, 32, 8, 128, seed=seed)
    lens = torch.tensor([200, 256], dtype=torch.int32, device=CUDA)
    q = made(2, 32, 128, seed=5)
    near = torch.arange(16, dtype=torch.int32, device=CUDA).view(2, 8)
    expected = decode_reference.paged_attention(q.double(), *(pool[-16:].double() for pool in pools), near, lens)
    assert_close(paged_attention(q, *pools, table, lens), expected, BF16)


def test_inductor_compiles_the_loss_whole():
    hidden, weight = made(64, 128).requires_grad_(), made(1000, 128, scale=0.1, seed=1)
    target, cu_rows = torch.arange(64, device=CUDA), torch.tensor([0, 20, 32, 50, 64], dtype=torch.int32)

    def step(x):
        return pair_loss(x * 2, weight, target, cu_rows, torch.zeros(4, device=CUDA)).loss

    expected = torch.autograd.grad(step(hidden), hidden)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), hidden)[0]
    assert_close(got, expected.double(), BF16)
