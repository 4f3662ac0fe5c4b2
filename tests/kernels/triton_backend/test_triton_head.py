"""The head's Triton kernels against the float64 definition: rows, and the product with its own epilogue.

On a GPU where there is one, else under Triton's interpreter, which is slow: sizes are as small as the tiles allow.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_checks import DEVICE, TOLERANCE, TRITON, assert_close, poisoned

from macpo.kernels.linear_logp import reference

pytestmark = pytest.mark.parametrize("backend", [TRITON])

HEADS = {"plain": (False, 1.0, None), "scale": (False, -0.5, None), "all": (True, 1.5, 3.0)}  # bias, scale, softcap
LOW = (torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
ONE_ROUNDING = 1.01 * 2.0**-8  # of bfloat16, and those of float32


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that a result nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rows():
    from macpo.kernels.linear_logp import triton_impl

    return triton_impl


@pytest.fixture
def gemm():
    from macpo.kernels.linear_logp import triton_gemm

    return triton_gemm


def make_rows(num_rows, vocab, head, seed=0):
    with_bias, scale, softcap = HEADS[head]
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(num_rows, vocab, generator=g) * 2).to(DEVICE)
    bias = torch.randn(vocab, generator=g).to(DEVICE) if with_bias else None
    return z, torch.randint(vocab, (num_rows,), generator=g).to(DEVICE), bias, scale, softcap


def exact(z, target, bias, scale, softcap):
    """log-prob, logsumexp and d logp / d z in float64."""
    z = z.double().detach().requires_grad_()
    y = (z if bias is None else z + bias.double()) * scale
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    logp = y.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    logp.sum().backward()
    return logp.detach(), y.detach().logsumexp(dim=1), z.grad


# One row in one tile; ragged rows of two tiles; two tiles and a tail that splits in three.
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 11), (3, 8199), (2, 16500)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_rows_equal_float64(backend, rows, monkeypatch, num_rows, vocab, head, split):
    if not split:
        monkeypatch.setattr(rows, "FEW_ROWS", 0)
    z, target, bias, scale, softcap = make_rows(num_rows, vocab, head)
    logp, lse, d = exact(z, target, bias, scale, softcap)
    # A single row's gradient is that of its target's 1 - p and of p, which need not be small.
    kept = z.clone()
    got = rows.row_logp(z, target, bias, scale, softcap)
    assert torch.equal(z, kept)
    assert_close(got[0], logp, torch.float32, "logp")
    assert_close(got[1], lse, torch.float32, "lse")
    for dtype in (torch.float32, *LOW):
        again, lse_again, fused = rows.row_logp_dlogits_(z.clone(), target, bias, scale, softcap, dtype)
        assert torch.equal(again, got[0]) and torch.equal(lse_again, got[1])
        assert fused.dtype == dtype and fused.shape == z.shape
        assert_close(fused, d, dtype, "fused d")
        known = rows.row_dlogits_(z.clone(), target, got[1], bias, scale, softcap, dtype)
        assert_close(known, d, dtype, "d from lse")


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize("vocab", [8195, 8208])  # rows that start at any address, and at multiples of 16 bytes
def test_nothing_outside_the_rows_is_read_or_written(backend, rows, monkeypatch, poison, vocab):
    pad = 3 if vocab % 16 else 8
    z, target, bias, scale, softcap = make_rows(2, vocab, "all")
    logp, _, d = exact(z, target, bias, scale, softcap)
    bias, bias_intact = poisoned(bias, poison)
    target, target_intact = poisoned(target, 2**62)
    for few_rows in (0, 132):
        monkeypatch.setattr(rows, "FEW_ROWS", few_rows)
        for dtype in (torch.float32, *LOW):
            inner, intact = poisoned(z, poison, pad)
            got, lse, fused = rows.row_logp_dlogits_(inner, target, bias, scale, softcap, dtype)
            assert_close(got, logp, torch.float32, "logp")
            assert_close(fused, d, dtype, "fused d")
            inner.copy_(z)
            assert_close(rows.row_logp(inner, target, bias, scale, softcap)[0], logp, torch.float32, "logp")
            known = rows.row_dlogits_(inner, target, lse, bias, scale, softcap, dtype)
            assert_close(known, d, dtype, "d from lse")
            in_place = dtype == torch.float32 or few_rows == 0
            assert in_place == (known.untyped_storage().data_ptr() == inner.untyped_storage().data_ptr())
            assert intact() and bias_intact() and target_intact()


def test_16_bits_over_their_own_float32_row_lose_nothing(backend, rows, monkeypatch):
    """In place equals the float32 gradient rounded: three tiles and a tail, each overwriting what was just read."""
    monkeypatch.setattr(rows, "FEW_ROWS", 0)
    z, target, _, scale, softcap = make_rows(2, 3 * 8192 + 77, "plain")
    _, lse, wide = rows.row_logp_dlogits_(z.clone(), target, None, scale, softcap, torch.float32)
    for dtype in LOW:
        _, _, low = rows.row_logp_dlogits_(z.clone(), target, None, scale, softcap, dtype)
        assert low.stride() == (2 * z.shape[1], 1)
        assert torch.equal(low, wide.to(dtype))
        known = rows.row_dlogits_(z.clone(), target, lse, None, scale, softcap, dtype)
        assert_close(known, wide, dtype)


def peculiar_rows():
    """Rows of 40 logits: all equal; one of 1e4, as target and not; -inf but two; confident at 200; tiny tail."""
    z = torch.zeros(7, 40)
    z[1, 7] = z[2, 7] = 1e4
    z[3] = float("-inf")
    z[3, [4, 9]] = torch.tensor([0.5, -0.5])
    z[4] = 199.0 - torch.arange(40) * 0.25
    z[4, 20] = 210.0  # p = 1 - 7.5e-5
    z[5] = -torch.arange(40.0) - 16
    z[5, 39] = 0.0  # p = 1 - 1.8e-7: three units of float32 below 1
    z[6, 0] = float("-inf")  # the target itself
    return z.to(DEVICE), torch.tensor([3, 7, 8, 4, 20, 39, 0], device=DEVICE)


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_peculiar_rows(backend, rows, monkeypatch, split):
    if split:
        monkeypatch.setattr(rows, "TILE", 16)  # tiles of 16 entries, so that 40 logits split in three
        monkeypatch.setattr(rows, "TILE_META", {"BLOCK_R": 2, "BLOCK_C": 8, "num_warps": 1})
    else:
        monkeypatch.setattr(rows, "FEW_ROWS", 0)
    z, target = peculiar_rows()
    logp, lse, d = exact(z, target, None, 1.0, None)
    got, got_lse, fused = rows.row_logp_dlogits_(z.clone(), target, None, 1.0, None, torch.float32)
    known = rows.row_dlogits_(z.clone(), target, got_lse, None, 1.0, None, torch.float32)
    assert (got <= 0).all() and (got_lse >= z.max(dim=1).values).all()
    assert got[6] == float("-inf")
    torch.testing.assert_close(got_lse.double(), lse, rtol=TOLERANCE[torch.float32], atol=0)
    # Each log-prob to the tolerance by itself: 1 - p of the confident rows is summed, not subtracted.
    torch.testing.assert_close(got[:6].double(), logp[:6], rtol=TOLERANCE[torch.float32], atol=0)
    at_target = range(7), target.tolist()
    if not split:  # the fused kernel still has 1 - p
        torch.testing.assert_close(fused[at_target].double(), d[at_target], rtol=TOLERANCE[torch.float32], atol=1e-30)
    # From a rounded logsumexp: half a unit of float32 at 210 is 7.6e-6, which is then the relative error of every p.
    for value, atol in ((fused, 1e-30 if not split else 1e-5), (known, 1e-5)):
        torch.testing.assert_close(value.double(), d, rtol=1e-5, atol=atol)


def test_softcap_of_saturated_and_tiny_logits(backend, rows):
    """tanh and its slope by value and by entry: 1 - tanh**2 of a saturated logit is no difference of ones."""
    z = torch.tensor([[-40.0, -9.0, -0.36, -0.34, -1e-3, 0.0, 1e-6, 0.2, 0.36, 3.0, 9.0, 12.0]], device=DEVICE)
    target = torch.tensor([9], device=DEVICE)
    logp, lse, d = exact(z, target, None, 1.0, 1.0)
    got, got_lse, fused = rows.row_logp_dlogits_(z.clone(), target, None, 1.0, 1.0, torch.float32)
    assert_close(got, logp, torch.float32)
    assert_close(got_lse, lse, torch.float32)
    torch.testing.assert_close(fused.double(), d, rtol=1e-5, atol=1e-12)  # exp(-2 * 12) to 24 units of 6e-8 and more


def test_no_token_as_target_gives_nan(backend, rows, gemm):
    z = torch.zeros(3, 20, device=DEVICE)
    target = torch.tensor([-100, 20, 2**32 + 1], device=DEVICE)
    logp, _, d = rows.row_logp_dlogits_(z.clone(), target, None, 1.0, None, torch.float32)
    assert logp.isnan().all() and d.isnan().all()
    logp, _ = gemm.gemm_logp(
        torch.zeros(3, 16, device=DEVICE), torch.zeros(20, 16, device=DEVICE), target, None, 1.0, None
    )
    assert logp.isnan().all()


def test_nan_stays_nan_in_its_row(backend, rows, gemm):
    z = torch.zeros(2, 20, device=DEVICE)
    z[0, 5] = float("nan")
    target = torch.tensor([3, 3], device=DEVICE)
    logp, lse = rows.row_logp(z, target, None, 1.0, None)
    assert logp.isnan().tolist() == lse.isnan().tolist() == [True, False]
    hidden = torch.zeros(2, 16, device=DEVICE)
    hidden[0] = float("nan")
    logp, lse = gemm.gemm_logp(hidden, torch.zeros(20, 16, device=DEVICE), target, None, 1.0, None)
    assert logp.isnan().tolist() == lse.isnan().tolist() == [True, False]


def test_no_rows_and_wrong_inputs(backend, rows, gemm):
    z, none = torch.zeros(0, 20, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert rows.row_logp(z, none, None, 1.0, None)[0].shape == (0,)
    assert rows.row_logp_dlogits_(z, none, None, 1.0, None, torch.bfloat16)[2].shape == (0, 20)
    assert gemm.gemm_logp(z, z, none, None, 1.0, None)[0].shape == (0,)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous columns"):
        rows.row_logp(torch.zeros(20, 3, device=DEVICE).T, target, None, 1.0, None)
    with pytest.raises(ValueError, match="float32 products"):
        rows.row_logp(torch.zeros(3, 20, device=DEVICE).double(), target, None, 1.0, None)
    with pytest.raises(ValueError, match="bfloat16 or float16, not"):
        rows.row_logp_dlogits_(torch.zeros(3, 20, device=DEVICE), target, None, 1.0, None, torch.float64)
    hidden, weight = torch.zeros(3, 16, device=DEVICE), torch.zeros(20, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"contiguous \[N, V\]"):
        gemm.gemm_logp_dlogits(hidden, weight, target, None, 1.0, torch.zeros(3, 40, device=DEVICE)[:, :20])
    with pytest.raises(ValueError, match="float16 cannot hold"):
        gemm.gemm_logp_dlogits(
            hidden.half(), weight.half(), target, None, 1.0, torch.zeros(3, 20, device=DEVICE).half()
        )
    with pytest.raises(ValueError, match="d must be"):
        gemm.gemm_logp_dlogits(hidden, weight, target, None, 1.0, torch.zeros(3, 20, device=DEVICE).half())
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        gemm.gemm_logp(*torch.zeros(2, 3, 4, device=DEVICE).double(), target, None, 1.0, None)


EVERY = [(head, dtype) for head in HEADS for dtype in (torch.float32, *LOW)]
SOME = list(zip(HEADS, (torch.bfloat16, torch.float32, torch.float16), strict=True)) if DEVICE == "cpu" else EVERY
# One row, V below a block; ragged rows over several blocks, V and H no multiples; over two groups of blocks, H below a
# step. The interpreter takes seconds a block, so it is given smaller ones for the groups (`small_blocks`).
GEMM_CASES = [
    ((1, 11, 40), EVERY),
    ((70, 300, 72), SOME),
    ((37, 70, 24) if DEVICE == "cpu" else (2117, 140, 24), EVERY),
]


@pytest.fixture
def small_blocks(gemm, monkeypatch):
    """Blocks of 16 rows and 32 tokens in groups of two for the interpreter, where the case is of several groups."""

    def choose(sizes):
        if DEVICE == "cpu" and sizes == GEMM_CASES[-1][0]:
            small = gemm.GemmConfig(block_n=16, block_v=32, block_h=32, num_warps=4, num_stages=2, group_n=2)
            for name in ("LARGE", "LARGE_GRADIENT", "FEW", "IEEE"):
                monkeypatch.setattr(gemm, name, replace(small))  # IEEE is told from the others by being another object

    return choose


@pytest.mark.parametrize(
    ("sizes", "head", "dtype"), [(sizes, *case) for sizes, cases in GEMM_CASES for case in cases], ids=str
)
def test_own_epilogue_equals_float64(backend, gemm, small_blocks, dtype, sizes, head):
    small_blocks(sizes)
    num_rows, vocab, width = sizes
    with_bias, scale, softcap = HEADS[head]
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, width, generator=g).mul(0.6).to(DEVICE, dtype) for size in (num_rows, vocab))
    bias = torch.randn(vocab, generator=g).to(DEVICE, dtype) if with_bias else None
    target = torch.randint(vocab, (num_rows,), generator=g).to(DEVICE)
    target[1::3] = target[0]  # duplicates
    wide = hidden.double(), weight.double(), None if bias is None else bias.double()
    expected = reference.linear_logp(*wide[:2], target, bias=wide[2], logit_scale=scale, softcap=softcap)
    lse = reference.head_logits(*wide, scale, softcap).logsumexp(dim=1)
    options = bias, scale, softcap
    logp, got_lse = gemm.gemm_logp(hidden, weight, target, *options)
    # float32 sums of `width` products against float64; 16-bit products are exact in float32.
    assert_close(logp, expected, torch.float32, "logp")
    assert_close(got_lse, lse, torch.float32, "lse")
    assert (logp <= 0).all()
    assert all(map(torch.equal, gemm.gemm_logp(hidden, weight, target, *options), (logp, got_lse)))
    if softcap is not None or dtype == torch.float16:
        return
    d = torch.full((num_rows, vocab), float("nan"), dtype=dtype, device=DEVICE)
    again, lse_again, factor = gemm.gemm_logp_dlogits(hidden, weight, target, bias, scale, d)
    assert torch.equal(again, logp) and torch.equal(lse_again, got_lse)
    assert_close(d * factor[:, None], exact(wide[0] @ wide[1].T, target, *options)[2], dtype, "d")
    first = d.clone()
    *_, factor_again = gemm.gemm_logp_dlogits(hidden, weight, target, bias, scale, d)
    assert torch.equal(d, first) and torch.equal(factor, factor_again)


# Other tiles on older devices, descriptors from 9 on; a padding of 8 keeps the addresses that they need. Every two of
# the three together; each combination would take twice as long.
@pytest.mark.parametrize(
    ("major", "pad", "poison"),
    [(major, pad, (NAN, -INF)[(major + (pad == 8)) % 2]) for major in (8, 9, 10) for pad in (3, 8)],
)
def test_own_epilogue_reads_nothing_outside(backend, gemm, monkeypatch, poison, major, pad):
    if DEVICE == "cpu":
        monkeypatch.setattr(gemm, "_device", lambda device: (major, 3))
    g = torch.Generator().manual_seed(2)
    clean = [torch.randn(size, 40, generator=g).bfloat16().to(DEVICE) for size in (67, 131)]
    target = torch.randint(131, (67,), generator=g).to(DEVICE)
    (hidden, hidden_intact), (weight, weight_intact) = (poisoned(x, poison, pad) for x in clean)
    inner, target_intact = poisoned(target, 2**62)
    outside = torch.full((69, 131), poison, dtype=torch.bfloat16, device=DEVICE)
    d = outside[1:-1]
    logp, _, factor = gemm.gemm_logp_dlogits(hidden, weight, inner, None, 1.0, d)
    assert_close(logp, reference.linear_logp(*(x.double() for x in clean), target), torch.float32)
    wanted = exact(clean[0].double() @ clean[1].double().T, target, None, 1.0, None)[2]
    assert_close(d * factor[:, None], wanted, torch.bfloat16)
    assert not outside[[0, -1]].isfinite().any()
    assert_close(gemm.gemm_logp(hidden, weight, inner, None, 1.0, None)[0], logp, torch.float32)
    assert hidden_intact() and weight_intact() and target_intact()


def test_own_epilogue_on_confident_rows(backend, gemm):
    """Logits of 200 in bfloat16 and a runner-up 1.25 below or 12 below: log-probs and 1 - p to the tolerance each."""
    hidden = (torch.eye(4) * 20).bfloat16().to(DEVICE)
    for second in (9.9375, 9.375):
        weight = torch.cat([torch.eye(4) * 10, torch.eye(4) * second]).bfloat16().to(DEVICE)
        target = torch.arange(4, device=DEVICE)
        logp, _ = gemm.gemm_logp(hidden, weight, target, None, 1.0, None)
        expected = reference.linear_logp(hidden.double(), weight.double(), target)
        torch.testing.assert_close(logp.double(), expected, rtol=TOLERANCE[torch.float32], atol=0)
        d = torch.empty(4, 8, dtype=torch.bfloat16, device=DEVICE)
        *_, factor = gemm.gemm_logp_dlogits(hidden, weight, target, None, 1.0, d)
        wanted = exact(hidden.double() @ weight.double().T, target, None, 1.0, None)[2]
        torch.testing.assert_close(d.double() * factor[:, None], wanted, rtol=ONE_ROUNDING, atol=1e-30)


@pytest.mark.parametrize("huge", [0.5, 60.0, 90.0, 1e4])
def test_own_epilogue_of_masked_and_huge_logits(backend, gemm, huge):
    """-inf by the bias in whole tiles and in single entries, one huge logit, a masked target and no token as target.

    From about 70 nats above the target on, rows are computed anew.
    """
    hidden, weight = torch.zeros(21, 16, device=DEVICE).bfloat16(), torch.zeros(600, 16, device=DEVICE).bfloat16()
    hidden[:, 0] = 1
    hidden[:, 1] = torch.arange(21) % 3
    weight[77, 0], weight[78, 1] = huge, -1.5
    bias = torch.zeros(600, device=DEVICE).bfloat16()
    bias[256:512] = float("-inf")
    bias[5] = float("-inf")
    target = torch.tensor([77, 3, 599, -100, 5, *range(100, 116)], device=DEVICE)
    d = torch.full((21, 600), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    logp, lse, factor = gemm.gemm_logp_dlogits(hidden, weight, target, bias, 1.0, d)
    logits = hidden.double() @ weight.double().T + bias.double()
    known = torch.arange(21, device=DEVICE) != 3
    wanted = -logits.softmax(1)
    wanted[known.nonzero()[:, 0], target[known]] = 0
    wanted[known.nonzero()[:, 0], target[known]] = -wanted[known].sum(1)  # 1 - p, not subtracted
    gradient = d.double() * factor[:, None]
    torch.testing.assert_close(gradient[known], wanted[known], rtol=ONE_ROUNDING, atol=1e-30)
    expected = logits.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(logp[known].double(), expected[known])
    torch.testing.assert_close(lse[known].double(), logits.logsumexp(1)[known])
    assert logp[3].isnan() and gradient[3].isnan().all()
    scored = gemm.gemm_logp(hidden, weight, target, bias, 1.0, None)
    assert torch.equal(scored[0].nan_to_num(7.0), logp.nan_to_num(7.0))


def test_rows_twice_are_bit_equal(backend, rows, monkeypatch):
    for few_rows in (0, 132):
        monkeypatch.setattr(rows, "FEW_ROWS", few_rows)
        z, *rest = make_rows(2, 8300, "all")
        runs = [rows.row_logp_dlogits_(z.clone(), *rest, torch.bfloat16) for _ in range(2)]
        assert all(map(torch.equal, *runs))


def test_a_broken_row_is_shared_by_parts_of_the_vocabulary(backend, gemm):
    """The last parts hold the best token and the target; no program walks more than its part, twice in all."""
    from macpo.kernels.linear_logp import triton_join

    launches = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(20, 16, generator=g).to(DEVICE), torch.randn(1000, 16, generator=g).to(DEVICE)
    hidden[[2, 18]] *= 60
    z = hidden.double() @ weight.double().T
    target = z.argmax(1)
    target[[2, 18]] = z[[2, 18]].argmin(1)
    d = torch.empty(20, 1000, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("repair_sums_kernel", "repair_kernel"):
            patch.setattr(triton_join, name, Noted(getattr(triton_join, name)))
        logp, _, factor = gemm.gemm_logp_dlogits(hidden, weight, target, None, 1.0, d)
        gemm.gemm_logp(hidden, weight, target, None, 1.0, None)
    assert launches == [(2, 16), (2, 16), (2, 16), (2, 1)]  # 1,000 tokens are 16 tiles; scoring writes no gradient
    wanted = z.log_softmax(1)
    assert_close(logp, wanted.gather(1, target[:, None])[:, 0], torch.float32)
    expected = torch.nn.functional.one_hot(target, 1000) - wanted.exp()
    assert_close(d * factor[:, None], expected, torch.float32)
