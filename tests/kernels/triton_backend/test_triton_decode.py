"""The decode kernels in Triton (paged_attention, write_kv, sample) against their references.

On a GPU they run compiled; elsewhere under Triton's interpreter, so the sizes here are small.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from kernel_checks import DEVICE, TRITON, assert_close

from macpo.kernels import paged_attention, triton_support, write_kv

paged_reference = import_module("macpo.kernels.paged_attention.reference")
pytestmark = list(TRITON.marks)

if triton_support.INSTALLED:
    paged = import_module("macpo.kernels.paged_attention.triton_impl")


def paged_case(lengths, heads=4, kv_heads=2, head_dim=64, block_tokens=16, dtype=torch.float32, spare=1, seed=0):
    """q, pools, table, context lengths: blocks shuffled, unused slots NaN, the table -1 past every context."""
    g = torch.Generator().manual_seed(seed)
    per_row = [-(-n // block_tokens) for n in lengths]
    blocks = torch.randperm(sum(per_row) + 2, generator=g)
    table = torch.full((len(lengths), max(per_row) + spare), -1, dtype=torch.int32)
    shape = (len(blocks), block_tokens, kv_heads, head_dim)
    pools = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    slots = []
    for row, length in enumerate(lengths):
        table[row, : per_row[row]] = blocks[sum(per_row[:row]) :][: per_row[row]].int()
        token = torch.arange(length)
        slots.append(table[row, token // block_tokens].long() * block_tokens + token % block_tokens)
    k, v = (torch.randn(sum(lengths), kv_heads, head_dim, generator=g).to(dtype) for _ in range(2))
    write_kv(k, v, *pools, torch.cat(slots), backend="torch")
    q = torch.randn(len(lengths), heads, head_dim, generator=g).to(dtype)
    return [x.to(DEVICE) for x in (q, *pools, table, torch.tensor(lengths, dtype=torch.int32))]


def wanted(case, **settings):
    q, k_pool, v_pool, table, context = (x.cpu() for x in case)
    wide = (q.double(), k_pool.double(), v_pool.double())
    return paged_reference.paged_attention(*wide, table, context, **settings).to(DEVICE)


@pytest.mark.parametrize("splits", [None, 1, 3])  # by shapes, without partials, more than the short contexts have
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "block_tokens"),
    [
        ((1,), 1, 1, 16),  # the smallest there is
        ((16, 17, 15, 70), 6, 2, 16),  # at, above and below a block's border; several tiles of keys
        ((64, 1, 130), 2, 2, 64),
        ((33, 100), 20, 1, 32),  # more query heads of a kv head than a tile has rows
    ],
)
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.3, 20), (None, 1)])
def test_paged_equals_float64(splits, lengths, heads, kv_heads, block_tokens, scale, window):
    case = paged_case(lengths, heads, kv_heads, block_tokens=block_tokens)
    if splits is None:
        out = paged_attention(*case, scale=scale, window=window, backend="triton")
    else:
        out = paged.paged_attention(*case, scale=scale, window=window, splits=splits)
    assert_close(out, wanted(case, scale=scale, window=window), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_paged_head_dims_and_dtypes(dtype, head_dim):
    case = paged_case((37, 5), 4, 2, head_dim, dtype=dtype)
    for splits in (1, 2):
        assert_close(paged.paged_attention(*case, splits=splits), wanted(case), dtype)


def test_paged_takes_strided_views():
    """q, k and v cut out of one projection, pools that are halves of one tensor."""
    q, k_pool, v_pool, table, context = paged_case((20, 3))
    both = torch.stack([k_pool, v_pool], 1)
    wide = torch.full((2, 7, 64), float("nan"), device=DEVICE)
    wide[:, 1:5] = q
    table = torch.cat([table, table], 1)[:, : table.shape[1]]
    out = paged_attention(wide[:, 1:5], both[:, 0], both[:, 1], table, context, backend="triton")
    assert_close(out, wanted((q, k_pool, v_pool, table, context)), torch.float32)


def test_split_count_depends_on_shapes_alone():
    assert paged.num_splits(256, 32, 8, 4096) == 1
    assert paged.num_splits(1, 32, 8, 128 * 200) == 66  # 528 programs for 132 SMs
    assert paged.num_splits(1, 32, 8, 300) == 3  # no split of fewer than 128 tokens
    assert paged.num_splits(1, 71, 1, 10**7) == 106  # 5 tiles of 16 heads


def test_what_the_paged_kernels_lack_is_named():
    for change, message in (
        ({"head_dim": 72}, "head size 72"),
        ({"block_tokens": 4}, "block_tokens 4"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(*paged_case((5,), **change), backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 80), (17, 128)])  # 17 * 128: more than one program
def test_write_kv_writes_slots_and_nothing_else(dtype, kv_heads, head_dim):
    g = torch.Generator().manual_seed(1)
    projected = torch.randn(6, 2 * kv_heads, head_dim, generator=g).to(dtype).to(DEVICE)
    k, v = projected[:, :kv_heads], projected[:, kv_heads:]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)  # heads before tokens, as attention layers have it
    slots = torch.tensor([7, -1, 0, 15, -1, 4], device=DEVICE)
    pools = [torch.full((4, 4, kv_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    write_kv(k, v, *pools, slots, backend="triton")
    for x, pool in zip((k, v), pools, strict=True):
        flat = pool.view(16, kv_heads, head_dim)
        assert torch.equal(flat[slots[slots >= 0]], x[slots >= 0])
        untouched = torch.ones(16, dtype=torch.bool, device=DEVICE)
        untouched[slots[slots >= 0]] = False
        assert flat[untouched].isnan().all()


def test_pools_beyond_2_31_elements():
    """Block and slot times stride overflow int32; only the touched pages of the pool are ever real memory."""
    head_dim, block_tokens = 64, 16
    blocks = 2**31 // (block_tokens * head_dim) + 3
    pool = torch.empty(blocks, block_tokens, 1, head_dim, dtype=torch.float16, device=DEVICE)
    g = torch.Generator().manual_seed(0)
    k = torch.randn(20, 1, head_dim, generator=g).half().to(DEVICE)
    table = torch.tensor([[blocks - 1, blocks - 2]], dtype=torch.int32, device=DEVICE)
    token = torch.arange(20, device=DEVICE)
    slots = table[0, token // block_tokens].long() * block_tokens + token % block_tokens
    write_kv(k, k, pool, pool, slots, backend="triton")
    assert torch.equal(pool.view(-1, 1, head_dim)[slots], k)
    q = torch.randn(1, 2, head_dim, generator=g).half().to(DEVICE)
    context = torch.tensor([20], dtype=torch.int32, device=DEVICE)
    wide = k.double()[:, 0]
    expected = ((q.double() @ wide.T) * head_dim**-0.5).softmax(-1) @ wide
    assert_close(paged_attention(q, pool, pool, table, context, backend="triton"), expected, torch.float16)
