"""prefix_attention's Triton kernels, its plan of blocks, its custom operators and flash-attn's sequences."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from kernel_checks import DEVICE, TOLERANCE, TRITON
from launches import Kernels

from macpo.kernels import BackendError, Segments, plan_attention, prefix_attention, use_backend
from macpo.kernels.prefix_attention import flash_impl, library, op, plan, reference
from macpo.kernels.prefix_attention.segments import visible

LAYOUTS = {
    "one token": [(1, [])],
    "prompt": [(19, [])],
    "pairs": [(9, [5, 4]), (1, [1]), (6, [3, 7])],  # a block of 16 spans two groups
    "long": [(37, [20, 3, 1]), (5, [2])],  # prompt and response longer than blocks, blocks between them to skip
    "whole blocks": [(32, [16]), (16, [])],
}
needs_triton = pytest.mark.parametrize("backend", [TRITON])


def segments_of(layout):
    return Segments.from_lengths(LAYOUTS[layout]).to(DEVICE)


def qkvg(num_tokens, heads, kv_heads, head_dim, dtype=torch.float32, seed=0):
    """q, k, v and the output's gradient, each inside a buffer of NaN: a read beyond an end shows."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [framed(torch.randn(*shape, generator=g).to(dtype)) for shape in shapes]


def framed(x, margin=3):
    buffer = torch.full((x.shape[0] + 2 * margin, *x.shape[1:]), float("nan"), dtype=x.dtype, device=DEVICE)
    buffer[margin:-margin] = x
    return buffer[margin:-margin]


def run(fn, tensors, segments, **options):
    """Output and the gradients of q, k, v."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = fn(*leaves, segments, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expect(tensors, segments, **options):
    return run(reference.prefix_attention, [x.double() for x in tensors], segments, **options)


def check(actual, expected, dtype, grad, tolerance=None):
    # 16-bit: probabilities and their gradients are rounded once more than the table's two roundings.
    tolerance = tolerance or TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
    for name, value, wanted in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert value.shape == wanted.shape
        # dq and dk are differences of numbers of do's size, which vanish where a token sees itself alone.
        size = max(wanted.norm().item(), grad.double().norm().item())
        error = (value.double() - wanted).norm().item() / size
        assert error <= tolerance, f"{name}: {error:.1e} above {tolerance:.0e}"


def small(tensors, segments, *, scale=0.3, window=None, block_q=16, block_k=16):
    """Forward and backward with tiny blocks, so that few tokens fill many."""
    from macpo.kernels.prefix_attention import triton_impl

    tile = triton_impl.Tile(block_q, block_k, 4, 1)
    tiles = triton_impl.Tiles(tile, tile, tile)
    integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
    visible_3t = plan.visible_keys(*integers, window)
    key_lists, query_lists = (plan.block_lists(visible_3t, block_q, block_k, by_key=by_key) for by_key in (False, True))
    q, k, v, grad = tensors
    o, lse = triton_impl.forward(q, k, v, visible_3t, key_lists, scale, tiles)
    grads = triton_impl.backward(grad, q, k, v, o, lse, visible_3t, key_lists, query_lists, scale, tiles)
    return [o, *grads[:3]]


@needs_triton
@pytest.mark.parametrize(
    ("layout", "heads", "window", "block_q", "block_k"),
    [
        ("one token", (2, 1), None, 16, 16),
        ("prompt", (2, 2), None, 16, 16),
        ("prompt", (2, 2), 3, 16, 16),
        ("pairs", (4, 1), None, 16, 32),
        ("pairs", (2, 1), 4, 32, 16),
        ("pairs", (1, 1), 1, 16, 16),
        ("long", (2, 1), None, 16, 16),
        ("long", (4, 2), None, 32, 16),
        ("long", (2, 2), 11, 16, 16),
        ("whole blocks", (2, 1), None, 16, 16),
        ("whole blocks", (2, 1), 20, 16, 32),
    ],
)
def test_many_blocks_equal_float64(backend, layout, heads, window, block_q, block_k):
    segments = segments_of(layout)
    tensors = qkvg(segments.num_tokens, *heads, 64)
    actual = small(tensors, segments, window=window, block_q=block_q, block_k=block_k)
    check(actual, expect(tensors, segments, scale=0.3, window=window), torch.float32, tensors[3])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])  # 8: mostly padding, a toy model's
def test_head_sizes_and_dtypes_equal_float64(backend, head_dim, dtype):
    """The launch configurations that users get, through the public function."""
    segments = segments_of("pairs")
    tensors = qkvg(segments.num_tokens, 2, 1, head_dim, dtype)
    actual = run(prefix_attention, tensors, segments, backend=backend)
    assert actual[0].dtype == dtype
    check(actual, expect(tensors, segments), dtype, tensors[3])


@needs_triton
def test_a_real_row_equals_float64(backend):
    """Groups as in preference data, blocks as on a GPU: several groups a block, a group over several blocks."""
    groups = [(60, [25, 30]), (150, [40, 10]), (3, [2])]
    segments = Segments.from_lengths(groups).to(DEVICE)
    tensors = qkvg(segments.num_tokens, 2, 1, 64, torch.bfloat16)
    check(
        run(prefix_attention, tensors, segments, backend=backend), expect(tensors, segments), torch.bfloat16, tensors[3]
    )


@needs_triton
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale(backend, scale):
    segments = segments_of("long")
    tensors = qkvg(segments.num_tokens, 2, 1, 64)
    actual = small(tensors, segments, scale=scale)
    check(actual, expect(tensors, segments, scale=scale), torch.float32, tensors[3])


@needs_triton
def test_large_and_equal_scores(backend):
    segments = segments_of("pairs")
    q, k, v, grad = qkvg(segments.num_tokens, 2, 1, 64)
    # Scores up to 1e3, whose exponentials overflow: rounded to 1e3 * 2^-24 = 6e-5, which is p's relative error.
    large = [q * 40, k * 4, v, grad]
    check(small(large, segments), expect(large, segments, scale=0.3), torch.float32, grad, tolerance=6e-5)
    flat = [q, k * 0, v, grad]
    check(small(flat, segments), expect(flat, segments, scale=0.3), torch.float32, grad)


@needs_triton
def test_nothing_is_written_beyond_an_end_and_nothing_left_unwritten(backend, monkeypatch):
    from macpo.kernels.prefix_attention import triton_impl

    made = []

    def empty(shape, dtype, device):
        flat = framed(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), margin=512)
        made.append(flat)
        return flat.view(tuple(shape))

    monkeypatch.setattr(triton_impl, "_empty", empty)
    for layout, head_dim in (("long", 80), ("pairs", 64)):
        segments = segments_of(layout)
        small(qkvg(segments.num_tokens, 2, 1, head_dim), segments)
    assert len(made) == 12  # o, lse, dq, dk, dv, delta
    for inner in made:
        frame = inner._base.clone()
        assert not inner.isnan().any()
        frame[512:-512] = float("nan")
        assert frame.isnan().all()


@needs_triton
def test_twice_gives_the_same_bits(backend):
    segments = segments_of("long")
    tensors = qkvg(segments.num_tokens, 4, 1, 64, torch.bfloat16)
    first, second = (small(tensors, segments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_a_view_of_a_wider_projection(backend):
    """v as a slice of one projection of q, k and v, which is not contiguous; q and k as the models' transposes are."""
    segments = segments_of("pairs")
    q, k, v, grad = qkvg(segments.num_tokens, 2, 2, 64)
    views = [
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat((k, k), -1)[..., :64],
        torch.cat((k, v), 1)[:, 2:],
        grad,
    ]
    check(run(prefix_attention, views, segments, backend=backend), expect(views, segments), torch.float32, grad)


@needs_triton
def test_the_plan_is_made_once_a_row(backend, monkeypatch):
    from macpo.kernels.prefix_attention import triton_plan

    calls = []
    make = triton_plan.make
    monkeypatch.setattr(triton_plan, "make", lambda *args: calls.append(args) or make(*args))
    segments = segments_of("pairs")
    q, k, v, _ = qkvg(segments.num_tokens, 2, 1, 64)

    def layers(q, k, v, segments):
        for window in (None, None, 4, 4):
            q = prefix_attention(q, k, v, segments, window=window, backend=backend)
        return q

    layers(q, k, v, segments)
    assert len(calls) == 2
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    compiled(q.detach().requires_grad_(), k, v, segments_of("pairs")).sum().backward()
    assert len(calls) == 4  # a graph that is differentiated merges equal calls
    segments = segments_of("pairs")
    with use_backend(backend):
        plan_attention(segments, [(None, 64), (4, 64)], q.dtype)
    assert len(calls) == 6
    compiled(q.detach().requires_grad_(), k, v, segments).sum().backward()
    assert len(calls) == 6  # what was made before is an input of the graph


@needs_triton
@pytest.mark.parametrize("window", [None, 1, 5, 30])
def test_the_kernels_plan_is_the_definition(backend, window):
    """Every entry, of blocks of both kinds and sizes, also where a row has fewer tokens than a block."""
    from macpo.kernels.prefix_attention import triton_plan

    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (12, 4), generator=g).tolist()
    for layout in (*LAYOUTS.values(), [(prompt, responses) for prompt, *responses in sizes]):
        s = Segments.from_lengths(layout).to(DEVICE)
        integers = (s.prefix_start, s.prefix_end, s.segment_start)
        visible_3t = plan.visible_keys(*integers, window)
        for forward, dkv in (((16, 16), (32, 16)), ((64, 64), (64, 64)), ((32, 16), (16, 64))):
            found = triton_plan.make(*integers, window, forward, dkv)
            assert torch.equal(found[0], visible_3t)
            for lists, size, by_key in ((found[1], forward, False), (found[2], dkv, True)):
                assert torch.equal(lists, plan.block_lists(visible_3t, *size, by_key=by_key))


@needs_triton
def test_a_plan_is_two_kernels(backend, monkeypatch):
    """Nothing but the launches and empty memory; the definition in torch is about a hundred kernels."""
    from macpo.kernels.prefix_attention import triton_plan

    segments = segments_of("long")
    integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
    launches = []

    class Noted:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    for name in ("bounds_kernel", "lists_kernel"):
        monkeypatch.setattr(triton_plan, name, Noted())
    with Kernels() as made:
        triton_plan.make(*integers, None, (64, 64), (64, 64))
    with Kernels() as defined:
        visible_3t = plan.visible_keys(*integers, None)
        for by_key in (False, True):
            plan.block_lists(visible_3t, 64, 64, by_key=by_key)
    assert (len(launches), made.count) == (2, 0)
    assert defined.count > 90


@pytest.mark.parametrize("window", [None, 1, 4, 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visible_keys_are_the_rule(layout, window):
    segments = segments_of(layout)
    lo, hi, own = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, window)
    token = torch.arange(segments.num_tokens, device=DEVICE)
    key, query = token[None], token[:, None]
    seen = (key >= lo[:, None]) & (key < hi[:, None]) | (key >= own[:, None]) & (key <= query)
    assert torch.equal(seen, visible(segments, 0, segments.num_tokens, window))


@pytest.mark.parametrize("window", [None, 5, 30])
@pytest.mark.parametrize("layout", [*LAYOUTS, "random"])
def test_lists_hold_every_pair_of_blocks_that_meet(layout, window):
    if layout == "random":
        g = torch.Generator().manual_seed(0)
        sizes = torch.randint(1, 40, (12, 4), generator=g).tolist()
        segments = Segments.from_lengths([(prompt, responses) for prompt, *responses in sizes]).to(DEVICE)
    else:
        segments = segments_of(layout)
    num_tokens = segments.num_tokens
    mask = visible(segments, 0, num_tokens, window)
    visible_3t = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, window)
    for block_q, block_k in ((16, 16), (32, 16), (16, 64)):
        by_query = plan.block_lists(visible_3t, block_q, block_k, by_key=False).tolist()
        by_key = plan.block_lists(visible_3t, block_q, block_k, by_key=True).tolist()
        num_extra = num_met = 0
        for m, n in product(range(len(by_query)), range(len(by_key))):
            part = mask[m * block_q : (m + 1) * block_q, n * block_k : (n + 1) * block_k]
            row, column = by_query[m], by_key[n]
            for lists, other in ((row, n), (column, m)):
                full, every = (lists[plan.FIRST : plan.FIRST + lists[i]] for i in (plan.NUM_FULL, plan.NUM_ALL))
                assert (other in every) >= bool(part.any())
                # Whole ones need no bounds: they have all their tokens.
                assert (other in full) <= (bool(part.all()) and part.shape == (block_q, block_k))
                assert len(set(every)) == len(every)
            listed = n in row[plan.FIRST : plan.FIRST + row[plan.NUM_ALL]]
            assert listed == (m in column[plan.FIRST : plan.FIRST + column[plan.NUM_ALL]])
            num_met += bool(part.any())
            num_extra += listed and not part.any()
        # Bounds are of whole blocks, so where a window cuts inside one, a neighbour may be visited in vain.
        assert num_extra <= (0 if window is None else 0.1 * num_met)


def test_most_blocks_of_a_long_prompt_need_no_mask():
    """8k prompt, four responses of 256: the tiles of head size 128 on a large GPU."""
    segments = Segments.from_lengths([(8192, [256] * 4)])
    visible_3t = plan.visible_keys(segments.prefix_start, segments.prefix_end, segments.segment_start, None)
    for block_q, block_k, by_key in ((128, 64, False), (64, 128, True)):
        lists = plan.block_lists(visible_3t, block_q, block_k, by_key=by_key)
        full, every = lists[:, plan.NUM_FULL].sum(), lists[:, plan.NUM_ALL].sum()
        assert full > 0.96 * every
        needed = visible(segments, 0, segments.num_tokens, None).sum() / (block_q * block_k)
        assert every < 1.03 * needed


def test_group_bounds_are_found():
    for groups in (*LAYOUTS.values(), [(3, [2, 3])] * 5):
        s = Segments.from_lengths(groups)
        assert tuple(plan.group_bounds(s.prefix_start, s.prefix_end, s.segment_start).tolist()) == s.bounds


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", [TRITON, "torch"])
def test_compiled_equals_eager(backend, window):
    segments = segments_of("pairs")
    tensors = qkvg(segments.num_tokens, 4, 2, 64)

    form = {} if window is None else {"window": window, "softcap": 1.5, "sinks": torch.ones(4, device=DEVICE)}

    def two_layers(q, k, v, segments):
        q = prefix_attention(q, k, v, segments, backend=backend, **form)
        return prefix_attention(q, k, v, segments, backend=backend, **form)

    eager = run(two_layers, tensors, segments)
    compiled = run(torch.compile(two_layers, fullgraph=True, backend="aot_eager"), tensors, segments)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_default_backend_compiles():
    """Nothing forced, as in a model: the choice itself must be traceable."""
    segments = segments_of("pairs")
    tensors = qkvg(segments.num_tokens, 4, 2, 64)
    compiled = run(torch.compile(prefix_attention, fullgraph=True, backend="aot_eager"), tensors, segments)
    check(compiled, expect(tensors, segments), torch.float32, tensors[3])


@needs_triton
def test_triton_operators_are_well_formed(backend):
    segments = segments_of("pairs")
    q, k, v, grad = qkvg(segments.num_tokens, 2, 1, 64)
    integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
    torch.library.opcheck(library.make_plan, (*integers, 4, 64, q.dtype))
    plan_ = library.make_plan(*integers, None, 64, q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, torch.ones(2, device=DEVICE))]
    torch.library.opcheck(library.forward, (*leaves[:3], *plan_, 0.3, 1.5, leaves[3]))
    form = (*plan_, 0.3, 1.5, torch.ones(2, device=DEVICE))
    torch.library.opcheck(library.backward, (grad, q, k, v, *library.forward(q, k, v, *form), *form))


def test_torch_operators_are_well_formed():
    segments = segments_of("pairs")
    q, k, v, grad = qkvg(segments.num_tokens, 4, 2, 8)
    integers = (segments.prefix_start, segments.prefix_end, segments.segment_start)
    sinks = torch.ones(4, device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks)]
    torch.library.opcheck(library.torch_forward, (*leaves[:3], *integers, None, 4, 1.5, leaves[3]))
    torch.library.opcheck(library.torch_backward, (grad, q, k, v, *integers, 0.3, None, 1.5, sinks))


@needs_triton
def test_what_the_kernels_do_not_take_is_named(backend):
    segments = segments_of("pairs")
    for tensors, message in (
        (qkvg(segments.num_tokens, 2, 1, 64, torch.float64), "not torch.float64"),
        (qkvg(segments.num_tokens, 2, 1, 264), "head sizes up to 256, not 264"),
    ):
        with pytest.raises(BackendError, match=message):
            prefix_attention(*tensors[:3], segments, backend=backend)
        assert op.choose(tensors[0])[0] == "torch"  # without being forced there is another way


def test_flash_is_refused_by_name():
    segments = segments_of("pairs")
    q, k, v, _ = qkvg(segments.num_tokens, 2, 1, 64, torch.float32)
    with pytest.raises(BackendError, match="backend 'flash' cannot be used: flash-attn is"):
        prefix_attention(q, k, v, segments, backend="flash")


def varlen_emulation(q, k, v, runs, scale, window):
    """Causal attention of each sequence, counted from its last query and key, as flash-attn documents it."""
    outputs = []
    borders = zip(runs.cu_queries.tolist(), runs.cu_keys.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(borders):
        assert q1 - q0 <= runs.max_queries and k1 - k0 <= runs.max_keys
        keys, values = (x[runs.keys[k0:k1]].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        query = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
        key = torch.arange(k1 - k0, device=q.device)[None]
        hidden = key > query
        if window is not None:
            hidden |= key < query - (window - 1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_sequences_are_the_rule(layout, window):
    segments = segments_of(layout)
    q, k, v, _ = (x.double() for x in qkvg(segments.num_tokens, 4, 2, 8))
    runs = flash_impl.runs(segments)
    assert runs.max_queries == max(n for prompt, responses in LAYOUTS[layout] for n in (prompt, *responses))
    out = varlen_emulation(q, k, v, runs, 0.3, window)
    expected = reference.prefix_attention(q, k, v, segments, scale=0.3, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_flash_needs_runs():
    zeros = torch.zeros(4, dtype=torch.int32)
    mixed = Segments(
        zeros, torch.tensor([0, 0, 2, 1], dtype=torch.int32), torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="share a prefix in front"):
        flash_impl.runs(mixed)


@pytest.mark.parametrize("window", [None, 6])
def test_flash_equals_float64(window):
    pytest.importorskip("flash_attn")
    if DEVICE != "cuda":
        pytest.skip("flash-attn needs a GPU")
    segments = segments_of("long")
    tensors = qkvg(segments.num_tokens, 4, 2, 64, torch.bfloat16)
    actual = run(prefix_attention, tensors, segments, window=window, backend="flash")
    check(actual, expect(tensors, segments, window=window), torch.bfloat16, tensors[3])
