"""prefix_attention and paged_attention against dense float64 references."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close

from macpo.kernels import Segments, paged_attention, prefix_attention, write_kv
from macpo.kernels.paged_attention import reference as paged_reference
from macpo.kernels.prefix_attention import cpu_impl, reference
from macpo.kernels.prefix_attention.segments import visible

LAYOUTS = {
    "one token": [(1, [])],
    "plain text": [(5, [])],
    "pair": [(3, [2, 3])],  # DESIGN.md's example
    "scoring": [(7, [4, 1, 6, 2])],
    "equal groups": [(3, [2, 2]), (3, [2, 2])],  # no padding anywhere
    "ragged": [(4, [2, 3]), (1, [1]), (6, [5, 1, 2]), (2, [])],
    "two buckets": [(2, [1, 1]), (30, [9, 5]), (3, [2]), (33, [4])],  # lengths that differ by more than 2x
}


def qkv(num_tokens, heads, kv_heads, head_dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]


def run(fn, tensors, segments, **options):
    """Output and the gradients of q, k, v."""
    *inputs, grad = tensors
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = fn(*leaves, segments, **options)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (4, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.3, 1), (None, 4)])
def test_values_and_gradients_equal_float64(layout, heads, scale, window):
    segments = Segments.from_lengths(LAYOUTS[layout])
    tensors = qkv(segments.num_tokens, *heads, 8)
    expected = run(reference.prefix_attention, [x.double() for x in tensors], segments, scale=scale, window=window)
    actual = run(prefix_attention, tensors, segments, scale=scale, window=window)
    for name, value, wanted in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        # dq and dk are differences of numbers of do's size, which vanish where a token sees itself alone (window 1).
        assert_close(value, wanted, torch.float32, name, floor=tensors[3].norm().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    segments = Segments.from_lengths(LAYOUTS["ragged"])
    tensors = qkv(segments.num_tokens, 4, 2, 16, dtype)
    expected = run(reference.prefix_attention, [x.double() for x in tensors], segments)
    actual = run(prefix_attention, tensors, segments)
    assert actual[0].dtype == dtype
    for name, value, wanted in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        # Inside, probabilities and their gradients are rounded once more than the table's two roundings.
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error < (1e-12 if dtype == torch.float64 else 8e-3), f"{name}: {error:.1e}"


def test_mask_is_the_written_rule():
    """The example of the design: tokens p0 p1 p2 | c0 c1 | r0 r1 r2."""
    segments = Segments.from_lengths([(3, [2, 3])])
    assert segments.prefix_end.tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    assert segments.segment_start.tolist() == [0, 0, 0, 3, 3, 5, 5, 5]
    assert segments.positions().tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    rows = ["10000000", "11000000", "11100000", "11110000", "11111000", "11100100", "11100110", "11100111"]
    seen = [[c == "1" for c in row] for row in rows]
    assert visible(segments, 0, 8, None).tolist() == seen
    # Positions, not places, are inside the window: r0 follows p2 directly.
    assert visible(segments, 0, 8, 2)[5].tolist() == [c == "1" for c in "00100100"]


@pytest.mark.parametrize("layout", ["pair", "scoring", "ragged", "two buckets"])
def test_each_response_equals_its_own_sequence(layout):
    """Sharing the prompt changes nothing: prompt + response alone, causal, gives the same rows."""
    groups = LAYOUTS[layout]
    segments = Segments.from_lengths(groups)
    q, k, v, _ = qkv(segments.num_tokens, 4, 2, 8)
    shared = prefix_attention(q, k, v, segments)
    start = 0
    for prompt, responses in groups:
        at = start + prompt
        for length in responses:
            own = torch.cat([torch.arange(start, start + prompt), torch.arange(at, at + length)])
            alone = Segments.from_lengths([(prompt + length, [])])
            out = reference.prefix_attention(*(x[own].double() for x in (q, k, v)), alone)
            assert_close(shared[own], out, torch.float32)
            at += length
        start = at


def test_groups_do_not_see_each_other():
    segments = Segments.from_lengths([(3, [2]), (4, [1, 2])])
    q, k, v, _ = qkv(segments.num_tokens, 2, 2, 4)
    before = prefix_attention(q, k, v, segments)
    k2, v2 = k.clone(), v.clone()
    k2[:5], v2[:5] = 100.0, 100.0
    after = prefix_attention(q, k2, v2, segments)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        for leaf in leaves:
            leaf[:5] = torch.nan
    out = prefix_attention(*leaves, segments)
    out[5:].sum().backward()
    assert torch.equal(before[5:], out[5:]) and all(leaf.grad[5:].isfinite().all() for leaf in leaves)


def test_without_group_borders_the_result_is_the_same():
    with_borders = Segments.from_lengths(LAYOUTS["ragged"])
    without = Segments(with_borders.prefix_start, with_borders.prefix_end, with_borders.segment_start)
    q, k, v, _ = qkv(with_borders.num_tokens, 2, 2, 4)
    expected = reference.prefix_attention(*(x.double() for x in (q, k, v)), with_borders)
    assert_close(prefix_attention(q, k, v, without), expected, torch.float32)


@pytest.mark.parametrize("layout", ["pair", "scoring", "equal groups", "two buckets"])
@pytest.mark.parametrize("window", [None, 4])
def test_padded_groups_give_the_same(monkeypatch, layout, window):
    """What other devices than CPUs run where Triton does not."""
    monkeypatch.setattr(cpu_impl, "make_plan", lambda *args: None)
    test_values_and_gradients_equal_float64(layout, (6, 2), None, window)


def test_runs_of_another_kind_are_not_mistaken():
    """A prefix inside its own run, a run that begins before its tokens, prefixes that overlap: the dense rule holds."""
    cases = [
        [(0, 2, 0)] * 4,  # the prefix is the run's own beginning
        [(0, 0, 0)] * 3 + [(0, 2, 2)] * 3,  # tokens 3, 4, 5 see from 2 on
        [(0, 0, 0)] * 4 + [(0, 3, 4)] * 2 + [(1, 4, 6)] * 2,
        [(0, 0, 0)] * 4 + [(0, 3, 4)] * 2 + [(0, 3, 6)] * 2,  # a part of the first run, twice: of the packed kind
    ]
    for number, marks in enumerate(cases):
        columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*marks, strict=True)]
        segments = Segments(*columns)
        assert (cpu_impl.make_plan(segments, None, 16, torch.float32) is None) == (number < 3)
        tensors = qkv(len(marks), 2, 2, 8)
        expected = run(reference.prefix_attention, [x.double() for x in tensors], segments)
        for value, wanted in zip(run(prefix_attention, tensors, segments), expected, strict=True):
            assert_close(value, wanted, torch.float32)


def test_runs_are_joined_where_a_call_costs_more():
    """Many short groups make few calls, long ones of different length a call each without padding."""
    short = Segments.from_lengths([(5 + i % 3, [3, 4, 2]) for i in range(50)])
    calls = cpu_impl.make_plan(short, None, 256, torch.float32)
    assert len(calls) == 3 and all(call.queries.runs == 50 for call in calls)
    long = Segments.from_lengths([(300, [90, 40]), (150, [60, 70])])
    calls = cpu_impl.make_plan(long, None, 256, torch.float32)
    assert [call.queries.ranges for call in calls] == [((0, 390),), ((430, 640),), ((390, 430),), ((640, 710),)]
    assert [call.keys.ranges[0] for call in calls] == [(0, 390), (430, 640), (0, 300), (430, 580)]
    assert [call.mask is None for call in calls] == [True, True, False, False]


def test_the_plan_is_made_once(monkeypatch):
    segments = Segments.from_lengths(LAYOUTS["ragged"])
    q, k, v, _ = qkv(segments.num_tokens, 2, 2, 4)
    calls = []
    plan = cpu_impl.make_plan
    monkeypatch.setattr(cpu_impl, "make_plan", lambda *args: calls.append(args) or plan(*args))
    for _ in range(3):
        prefix_attention(q, k, v, segments)
    prefix_attention(q, k, v, segments, window=2)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(8, 3, 4), "v": torch.zeros(8, 3, 4)}, "no multiple of Hkv"),
        ({"k": torch.zeros(7, 2, 4), "v": torch.zeros(7, 2, 4)}, "differ in T"),
        ({"v": torch.zeros(8, 2, 4).double()}, "one dtype"),
        ({"q": torch.zeros(9, 2, 4), "k": torch.zeros(9, 2, 4), "v": torch.zeros(9, 2, 4)}, "describe 8 tokens"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {name: torch.zeros(8, 2, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        prefix_attention(**(inputs | {"segments": Segments.from_lengths([(3, [2, 3])])} | change))


def test_bad_segments_are_named():
    zeros = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="prefix_end must be int32"):
        Segments(zeros, zeros.long(), zeros)
    for borders in ((0, 3), (1, 4), (0, 2, 2, 4), (4,)):
        with pytest.raises(ValueError, match="cu_groups"):
            Segments(zeros, zeros, zeros, borders)


def paged_inputs(lengths, heads, kv_heads, block_tokens, seed=0):
    """Pools whose unused slots are NaN, written by write_kv in a shuffled block order."""
    g = torch.Generator().manual_seed(seed)
    head_dim, batch = 8, len(lengths)
    per_row = [-(-n // block_tokens) for n in lengths]
    blocks = torch.randperm(sum(per_row) + 2, generator=g)
    table = torch.full((batch, max(per_row) + 1), -1, dtype=torch.int32)
    pools = [torch.full((len(blocks), block_tokens, kv_heads, head_dim), float("nan")) for _ in range(2)]
    at = 0
    for row, length in enumerate(lengths):
        table[row, : per_row[row]] = blocks[at : at + per_row[row]].int()
        at += per_row[row]
        token = torch.arange(length)
        slots = table[row, token // block_tokens].long() * block_tokens + token % block_tokens
        write_kv(*(torch.randn(length, kv_heads, head_dim, generator=g) for _ in range(2)), *pools, slots)
    q = torch.randn(batch, heads, head_dim, generator=g)
    return q, *pools, table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(1,), (4, 5, 3), (17, 1, 16, 32)], ids=str)  # at, below and above block borders
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.5, 3), (None, 1)])
def test_paged_equals_float64(heads, lengths, scale, window):
    q, k_pool, v_pool, table, context = paged_inputs(lengths, *heads, block_tokens=4)
    wide = (q.double(), k_pool.double(), v_pool.double())
    expected = paged_reference.paged_attention(*wide, table, context, scale=scale, window=window)
    out = paged_attention(q, k_pool, v_pool, table, context, scale=scale, window=window)
    assert_close(out, expected, torch.float32)


def test_paged_decode_equals_the_last_row_of_prefix_attention():
    segments = Segments.from_lengths([(11, [])])
    q, k, v, _ = qkv(11, 4, 2, 8)
    pools = [torch.zeros(3, 4, 2, 8) for _ in range(2)]
    write_kv(k, v, *pools, torch.arange(11))
    table, context = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
    out = paged_attention(q[10:], *pools, table, context)
    expected = reference.prefix_attention(q.double(), k.double(), v.double(), segments)[10:]
    assert_close(out, expected, torch.float32)


def test_paged_bad_input_is_named():
    q, k_pool, v_pool, table, context = paged_inputs((3, 5), 2, 2, 4)
    for args, message in (
        ((q, k_pool, v_pool, table.long(), context), "block_table must be int32"),
        ((q, k_pool, v_pool, table, context + 100), "context_lens must be in"),
        ((q, k_pool, v_pool, table, context * 0), "context_lens must be in"),
        ((q.double(), k_pool, v_pool, table, context), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(*args)


def test_write_kv_skips_padding_and_names_slots_outside():
    k, v = torch.arange(24.0).view(6, 1, 4), -torch.arange(24.0).view(6, 1, 4)
    for slots in ([3, -1, 0, -1, 7, 5], [-1] * 6, [-1, 1, 2, 3, 4, 5]):
        pools, index = [torch.full((2, 4, 1, 4), 9.0) for _ in range(2)], torch.tensor(slots)
        write_kv(k, v, *pools, index)
        for x, pool in zip((k, v), pools, strict=True):
            expected = torch.full((8, 1, 4), 9.0)
            expected[index[index >= 0]] = x[index >= 0]
            assert torch.equal(pool.view(8, 1, 4), expected)
    for slot in (-2, 8):
        with pytest.raises(IndexError, match=r"slots must be in -1\.\.7"):
            write_kv(k[:1], v[:1], *pools, torch.tensor([slot]))
    with pytest.raises(ValueError, match="one dtype"):
        write_kv(k.double(), v.double(), *pools, torch.arange(6))


def decode_step(q, k, v, k_pool, v_pool, slots, table, context):
    write_kv(k, v, k_pool, v_pool, slots)
    return paged_attention(q, k_pool, v_pool, table, context, window=6) + 1


def test_paged_operators_compile_whole():
    """The write is seen by the read in one graph, and both operators describe themselves rightly to torch."""
    q, *pools, table, context = paged_inputs((4, 5, 3), 6, 2, block_tokens=4)
    k, v = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(2)).unbind(0)
    last = context.long() - 1
    slots = table[torch.arange(3), last // 4].long() * 4 + last % 4
    slots[2] = -1
    expected_pools, compiled_pools = ([pool.clone() for pool in pools] for _ in range(2))
    expected = decode_step(q, k, v, *expected_pools, slots, table, context)
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, *compiled_pools, slots, table, context), expected)
    for one, other in zip(compiled_pools, expected_pools, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    pools = [pool.nan_to_num() for pool in pools]  # opcheck compares with ==
    form = (None, 3, 1.5, torch.randn(6), "torch")  # scale, window, softcap, sinks, backend
    torch.library.opcheck(torch.ops.macpo.paged_attention, (q, *pools, table, context, *form))
    torch.library.opcheck(torch.ops.macpo.write_kv, (k, v, *pools, slots))
