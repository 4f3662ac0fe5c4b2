"""The C++ extension itself: layouts, threads, poison around buffers, edge values and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import assert_close, bf16, framed, threads
from torch import Tensor

from macpo.kernels import BackendError, SampleParams, native, slot_attention
from macpo.kernels.linear_logp import rows_torch
from macpo.kernels.paged_attention.slots import reference_slot_attention

pytestmark = pytest.mark.skipif(native.module is None, reason=native.why_absent or "built")
has_gemm = pytest.mark.skipif(not native.has_bf16_gemm(), reason="needs a CPU with AVX512-BF16")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(False, 1.0, None), (True, 0.5, None), (False, 1.0, 20.0), (True, 2.0, 5.0)]  # bias, scale, softcap
# One element; less than a vector; one past a block of 1024 tokens; over two chunks of lanes, rows past a tile of 32.
SIZES = [(1, 1), (3, 7), (5, 1025), (33, 1040)]


def head(bias: bool, vocab: int, g: torch.Generator) -> Tensor | None:
    return torch.randn(vocab, generator=g) if bias else None


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
@pytest.mark.parametrize(("num_rows", "vocab"), SIZES)
def test_rows_of_both_layouts(num_rows, vocab, bias, scale, softcap, lanes):
    g = torch.Generator().manual_seed(num_rows)
    z = torch.randn(num_rows, vocab, generator=g) * 4
    target = torch.randint(vocab, (num_rows,), generator=g)
    bias_v = head(bias, vocab, g)
    expected = rows_torch.row_logp_dlogits_(
        z.double(), target, None if bias_v is None else bias_v.double(), scale, softcap, torch.float64
    )
    for dtype in DTYPES:
        view, frame = framed(z, lanes)
        logp, lse = native.row_logp(view, target, bias_v, scale, softcap)
        assert torch.equal(view, z)
        again_logp, again_lse, d = native.row_logp_dlogits_(view, target, bias_v, scale, softcap, dtype)
        assert torch.equal(logp, again_logp) and torch.equal(lse, again_lse)
        assert d.dtype == dtype and d.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        assert d.stride() == tuple(s if s == 1 else s * (1 if dtype == torch.float32 else 2) for s in view.stride())
        known, known_frame = framed(z, lanes)
        known = native.row_dlogits_(known, target, lse, bias_v, scale, softcap, dtype)
        assert frame().isnan().all() and known_frame().isnan().all()
        # A log-prob is a difference of numbers of the size of the logsumexp, a gradient one of 1 and a probability.
        assert_close(logp, expected[0], torch.float32, "logp", floor=expected[1].norm().item())
        assert_close(lse, expected[1], torch.float32, "lse")
        floor = scale * num_rows**0.5
        assert_close(d, expected[2], dtype, "d", floor=floor)
        assert_close(known, expected[2], dtype, "d from lse", floor=floor)


@pytest.mark.parametrize("lanes", [False, True])
def test_gradients_of_16_bits_are_the_rounded_ones(lanes):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(40, 1500, generator=g) * 12  # probabilities down to nothing: halves become subnormal and 0
    target = torch.randint(1500, (40,), generator=g)

    def gradient(dtype: torch.dtype) -> Tensor:
        copy = z.T.contiguous().T if lanes else z.clone()
        return native.row_logp_dlogits_(copy, target, None, 1.0, None, dtype)[2]

    full = gradient(torch.float32)
    assert (full.half() == 0).any() and ((full.half() != 0) & (full.abs() < 2.0**-14)).any()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(gradient(dtype), full.to(dtype))


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_edge_rows(lanes, softcap):
    z = torch.zeros(5, 700)
    z[1] = 3.25  # equal logits that are not 0
    z[2, 9], z[3, 9] = 1e4, 1e4  # one huge logit, hit and missed
    z[4] = torch.linspace(-60, 60, 700)
    target = torch.tensor([5, 5, 9, 5, 699])  # with duplicates
    view, _ = framed(z, lanes)
    logp, lse, d = native.row_logp_dlogits_(view, target, None, 1.0, softcap, torch.float32)
    expected = rows_torch.row_logp_dlogits_(z.double(), target, None, 1.0, softcap, torch.float64)
    for got, want, what in zip((logp, lse, d), expected, ("logp", "lse", "d"), strict=True):
        for row in range(5):
            assert_close(got[row], want[row], torch.float32, f"{what} of row {row}", floor=1.0)
    assert (logp <= 0).all()


@pytest.mark.parametrize("lanes", [False, True])
def test_infinite_and_nan_rows_equal_torch(lanes):
    z = torch.full((4, 600), float("-inf"))
    z[1, 5] = 0.0
    z[2] = 1.0
    z[2, 599] = float("nan")
    z[3] = 1.0
    z[3, 0] = float("inf")
    target = torch.tensor([0, 5, 1, 1])
    view, _ = framed(z, lanes)
    for got, want in zip(native.row_logp(view, target), rows_torch.row_logp(z, target, None, 1.0, None), strict=True):
        assert torch.equal(got[:2].isnan(), want[:2].isnan()) and torch.equal(got[1], want[1])
        assert not got[2:].isfinite().any()
    d = native.row_logp_dlogits_(view, target, None, 1.0, None, torch.bfloat16)[2]
    assert d[2].isnan().all() and (d[1] == 0).all()


# n, h, v: one element; odd h below a vector; past a tile of 32 columns and 12 rows, odd h past a block of 128; past
# the 2048 values of h that are copied at a time, v past the 48 rows of a copy.
GEMM_SIZES = [(1, 1, 1), (3, 7, 5), (33, 131, 50), (17, 2051, 97)]


@has_gemm
@pytest.mark.parametrize(("num_rows", "hidden_size", "vocab"), GEMM_SIZES)
def test_bf16_products(num_rows, hidden_size, vocab):
    hidden, hidden_frame = framed(bf16(num_rows, hidden_size))
    weight, weight_frame = framed(bf16(vocab, hidden_size, seed=1))
    z = native.bf16_logits(hidden, weight)
    assert z.dtype == torch.float32 and z.shape == (num_rows, vocab) and z.T.is_contiguous()
    assert_close(z, hidden.double() @ weight.double().T, torch.float32)
    assert torch.equal(z, native.bf16_logits(hidden.contiguous(), weight.T.contiguous().T))

    start = torch.randn(vocab, hidden_size)
    dweight, frame = framed(start)
    d = bf16(vocab, 2 * num_rows, seed=2)[:, :num_rows]  # as it lies over the front of float32 rows
    assert native.bf16_accumulate_(dweight, d, hidden) is dweight
    assert_close(dweight, start.double() + d.double() @ hidden.double(), torch.float32)
    native.bf16_accumulate_(dweight.fill_(math.nan), d, hidden, overwrite=True)
    assert_close(dweight, d.double() @ hidden.double(), torch.float32)
    assert all(around().isnan().all() for around in (hidden_frame, weight_frame, frame))


@has_gemm
def test_bf16_products_with_no_row_or_no_column():
    assert torch.equal(native.bf16_logits(bf16(2, 0), bf16(5, 0)), torch.zeros(2, 5))
    assert native.bf16_logits(bf16(0, 4), bf16(5, 4)).shape == (0, 5)


@has_gemm
@pytest.mark.parametrize("hidden_size", [512, 2048])
def test_logits_of_bf16_err_no_more_than_those_of_float32(hidden_size):
    """Log-probs of bf16 inputs, confident rows among them: at most 1.1 times the error of float32 products."""
    hidden, weight = bf16(192, hidden_size), bf16(2000, hidden_size, seed=1, scale=3 * hidden_size**-0.5)
    target = torch.arange(192) % 50
    weight[:50] = hidden[:50] * 0.05  # hidden i finds token i
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert (exact > -1e-3).sum() >= 40

    def error(z: Tensor) -> float:
        return (native.row_logp(z, target)[0] - exact).square().mean().sqrt().item()

    z = native.bf16_logits(hidden, weight)
    assert error(z) <= 1.1 * error(hidden.float() @ weight.float().T)
    assert native.row_logp(z, target)[0].max() <= 0


def test_without_the_instruction_the_products_refuse(monkeypatch):
    monkeypatch.setattr(native, "has_bf16_gemm", lambda: False)
    with pytest.raises(RuntimeError, match=r"bf16_logits needs .* AVX512-BF16"):
        native.bf16_logits(bf16(2, 2), bf16(2, 2))
    with pytest.raises(RuntimeError, match=r"bf16_accumulate_ needs .* AVX512-BF16"):
        native.bf16_accumulate_(torch.zeros(2, 2), bf16(2, 2), bf16(2, 2))


# heads, kv heads, head size: whole vectors; a group of 3 and a ragged head; two vectors and a bit; the largest.
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (6, 2, 20), (2, 1, 40), (2, 2, 128)])
@pytest.mark.parametrize("window", [None, 1, 70])
def test_slot_attention(heads, kv_heads, size, window):
    g = torch.Generator().manual_seed(size)
    lens = torch.tensor([1, 16, 17, 130, 63])  # one key; whole vectors of keys; one more; over two spans of 64
    q = torch.randn(1 + 5 * heads * (size + 1), generator=g)[1:].view(5, heads, size + 1)[..., :size]
    k, v = (torch.full((1 + 7 * kv_heads * 140 * size,), float("nan"))[1:].view(7, kv_heads, 140, size) for _ in "kv")
    for cache in (k, v):
        for row, length in enumerate(lens.tolist()):
            cache[row, :, :length] = torch.randn(kv_heads, length, size, generator=g)
    out = slot_attention(q, k, v, lens, scale=0.3, window=window, backend="native")
    expected = reference_slot_attention(q.double(), k.double(), v.double(), lens, scale=0.3, window=window)
    assert_close(out, expected, torch.float32)
    finite_k, finite_v = k.nan_to_num(7.0), v.nan_to_num(7.0)
    for dtype in DTYPES:
        cast = (q.to(dtype), finite_k.to(dtype), finite_v.to(dtype))
        other = slot_attention(*cast, lens, scale=0.3, window=window, backend="torch")
        assert_close(
            other, reference_slot_attention(*(x.double() for x in cast), lens, scale=0.3, window=window), dtype
        )


def test_slot_attention_where_the_kernel_does_not_fit():
    q, cache, lens = torch.randn(2, 2, 8), torch.randn(2, 2, 5, 8), torch.tensor([1, 5])
    assert_close(slot_attention(q, cache, cache, lens), reference_slot_attention(q, cache, cache, lens), torch.float32)
    with pytest.raises(BackendError, match=r"takes float32 and head sizes 16 to 128, got torch.float32 and 8"):
        slot_attention(q, cache, cache, lens, backend="native")


@pytest.mark.parametrize("lanes", [False, True])
def test_no_rows(lanes):
    z, none = (torch.zeros(9, 0).T if lanes else torch.zeros(0, 9)), torch.zeros(0, dtype=torch.int64)
    logp, lse, d = native.row_logp_dlogits_(z, none, None, 1.0, None, torch.bfloat16)
    assert logp.shape == lse.shape == (0,) and d.shape == (0, 9) and d.dtype == torch.bfloat16
    cache = torch.zeros(2, 2, 5, 16)
    assert slot_attention(torch.zeros(0, 2, 16), cache, cache, none).shape == (0, 2, 16)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_slot_attention_refuses(backend):
    q, cache = torch.zeros(2, 4, 16), torch.zeros(3, 2, 5, 16)
    for lens in ([0, 1], [1, 6]):
        with pytest.raises(ValueError, match=r"lens must be in 1\.\.5|length outside the slot"):
            slot_attention(q, cache, cache, torch.tensor(lens), backend=backend)
    one = torch.tensor([1, 1])
    bad: list[tuple[str, tuple[Tensor, ...], dict[str, int]]] = [
        ("lens must be int64", (q, cache, cache, one.int()), {}),
        ("no multiple", (torch.zeros(2, 3, 16), cache, cache, one), {}),
        ("slots lack", (q, cache[:1], cache[:1], one), {}),
        ("one dtype", (q.double(), cache, cache, one), {}),
        ("need q", (q, cache, cache[..., :8], one), {}),
        ("window must be", (q, cache, cache, one), {"window": 0}),
    ]
    for why, args, options in bad:
        with pytest.raises(ValueError, match=why):
            slot_attention(*args, **options, backend=backend)


def decode_inputs(num_rows: int = 64, vocab: int = 2500) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab, generator=g) * 3
    index = torch.arange(num_rows)
    keys = torch.stack([index, index % 3, index % 2], 1)
    return logits, torch.randint(vocab, (num_rows,), generator=g), keys, index


def test_threads_do_not_change_a_bit():
    logits, target, keys, positions = decode_inputs()
    params = SampleParams(1, top_k=50, top_p=0.9, batch=len(logits))
    hidden, weight, lens = bf16(40, 200), bf16(2500, 200, seed=1), torch.arange(64) * 3 + 1
    q, cache = torch.randn(64, 4, 32), torch.randn(64, 2, 200, 32)
    for x in (logits, weight, cache):
        assert x.numel() >= native.PARALLEL_ELEMENTS  # large enough to be split

    def everything() -> list[Tensor]:
        results = [*native.sample(logits, params, keys, positions), slot_attention(q, cache, cache, lens)]
        for z in (logits, logits.T.contiguous().T):
            logp, lse, d = native.row_logp_dlogits_(z + 0, target, None, 0.5, 30.0, torch.bfloat16)
            results += [logp, lse, d, native.row_dlogits_(z + 0, target, lse, None, 0.5, 30.0, torch.float32)]
        if native.has_bf16_gemm():
            z = native.bf16_logits(hidden, weight)
            results += [z, native.bf16_accumulate_(torch.ones(2500, 200), z.T.bfloat16(), hidden)]
        return results

    with threads(1):
        alone = everything()
    for count in (2, 3):
        with threads(count):
            for one, other in zip(alone, everything(), strict=True):
                assert torch.equal(one, other)


def test_strided_inputs_are_read_right():
    logits, _, keys, positions = decode_inputs()
    wide = torch.stack([logits, logits + 1], dim=-1)[..., 0]
    params = SampleParams(1, batch=len(logits))
    strided = native.sample(wide, params, keys.T.contiguous().T, positions)
    for one, other in zip(strided, native.sample(logits, params, keys, positions), strict=True):
        assert torch.equal(one, other)


def test_the_extension_refuses_what_would_read_out_of_bounds():
    logits, target, keys, positions = decode_inputs()
    with pytest.raises(ValueError, match="one axis of z must be contiguous"):
        native.row_logp(torch.stack([logits, logits], dim=-1)[..., 0], target)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        native.row_logp(logits, target + logits.shape[1])
    with pytest.raises(ValueError, match="one id a row"):
        native.row_logp(logits.T.contiguous().T, target[1:])
    with pytest.raises(ValueError, match="bias must have one entry a token"):
        native.row_logp(logits, target, torch.zeros(3))
    with pytest.raises(ValueError, match=r"lse must be \[N\]"):
        native.row_dlogits_(logits.clone(), target, torch.zeros(1), None, 1.0, None, torch.float32)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.float64"):
        native.row_logp_dlogits_(logits.clone(), target, None, 1.0, None, torch.float64)
    with pytest.raises(ValueError, match="z must be float32"):
        native.row_logp(logits.double(), target)
    with pytest.raises(ValueError, match="one entry a row"):
        native.sample(logits, SampleParams(1, batch=3), keys, positions)


@has_gemm
def test_products_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="bfloat16 matrices"):
        native.bf16_logits(torch.zeros(2, 4), bf16(3, 4))
    with pytest.raises(ValueError, match="do not fit"):
        native.bf16_logits(bf16(2, 4), bf16(3, 5))
    with pytest.raises(ValueError, match="rows of a and c must be contiguous"):
        native.bf16_accumulate_(torch.zeros(3, 4), bf16(2, 3).T, bf16(2, 4))
    with pytest.raises(ValueError, match="dweight must be float32"):
        native.bf16_accumulate_(bf16(3, 4), bf16(3, 2), bf16(2, 4))
