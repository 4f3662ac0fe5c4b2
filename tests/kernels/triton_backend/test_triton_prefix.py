"""prefix_attention's Triton kernels, its plan of blocks, its custom operators and flash-attn's sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_checks import DEVICE, LAYOUTS, TOLERANCE, TRITON, between_nans, qkvg, segments_of

from macpo.kernels import BackendError, Segments, prefix_attention
from macpo.kernels.prefix_attention import flash_impl, library, op, plan, reference

needs_triton = pytest.mark.parametrize("backend", [TRITON])


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
        flat = between_nans(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), margin=512)
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
