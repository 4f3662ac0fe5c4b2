"""Softcap and sinks in every attention operator and backend against dense float64 references.

Triton's kernels run compiled on a GPU, elsewhere under the interpreter, so the sizes are small.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BACKENDS, DEVICE, TOLERANCE, TRITON, assert_close
from torch import Tensor

from macpo.kernels import BackendError, Segments, paged_attention, prefix_attention, slot_attention
from macpo.kernels.paged_attention import reference as paged_reference
from macpo.kernels.paged_attention.slots import reference_slot_attention
from macpo.kernels.prefix_attention import cpu_impl, cpu_softcap, op, reference

FORMS = {"softcap": (1.5, False), "sinks": (None, True), "both": (0.7, True)}  # scores are about 1
forms = pytest.mark.parametrize("form", FORMS)
# A prompt that fills blocks and responses that do not; groups of other lengths, of which a block holds several.
GROUPS = [(64, [10, 3]), (5, [2, 4, 1]), (1, [])]
NAMES = ("o", "dq", "dk", "dv", "dsinks")


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def sinks_of(form: str, heads: int) -> Tensor | None:
    """One above, one below what the scores are, and between; of an odd dtype, as a model's parameter may be."""
    return torch.tensor([4.0, -3.0, 0.5, 1.25, 2.0, 0.0], device=DEVICE)[:heads].bfloat16() if FORMS[form][1] else None


def run(fn, tensors: list[Tensor], segments: Segments, form: str, **options) -> list[Tensor]:
    """Output and the gradients of q, k, v and the sinks."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    sinks = sinks_of(form, inputs[0].shape[1])
    if sinks is not None:
        sinks = sinks.to(torch.promote_types(grad.dtype, torch.float32)).requires_grad_()
        leaves.append(sinks)
    out = fn(*leaves[:3], segments, softcap=FORMS[form][0], sinks=sinks, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_prefix(form, groups, heads, head_dim, dtype=torch.float32, *, backend="torch", factor=1, **options):
    segments = Segments.from_lengths(groups).to(DEVICE)
    shapes = [(segments.num_tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    tensors = drawn(*shapes, dtype=dtype)
    actual = run(prefix_attention, tensors, segments, form, backend=backend, **options)
    expected = run(reference.prefix_attention, [x.double() for x in tensors], segments, form, **options)
    assert actual[0].dtype == dtype
    for name, value, wanted in zip(NAMES[: len(expected)], actual, expected, strict=True):
        # dq, dk and dsinks are differences of numbers of do's size
        size = max(wanted.norm().item(), tensors[3].double().norm().item())
        error = (value.double() - wanted).norm().item() / size
        assert error <= TOLERANCE[dtype] * factor, f"{name}: {error:.1e}"


@forms
@pytest.mark.parametrize("path", ["runs", "blocks of queries", "padded groups"])
@pytest.mark.parametrize(("heads", "scale", "window"), [((6, 2), None, None), ((2, 2), -0.4, 3), ((4, 1), 0.3, 1)])
def test_prefix_attention_with_torch(form, path, heads, scale, window, monkeypatch):
    if path == "blocks of queries":
        monkeypatch.setattr(cpu_softcap, "_BLOCK_SCORES", 1)
    elif path == "padded groups":  # what other devices than CPUs run where Triton does not
        monkeypatch.setattr(cpu_impl, "make_plan", lambda *args: None)
    check_prefix(form, GROUPS, heads, 8, scale=scale, window=window)
    check_prefix(form, GROUPS, heads, 8, torch.float64, scale=scale, window=window)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefix_attention_of_16_bits(form, dtype):
    check_prefix(form, GROUPS, (4, 2), 16, dtype, factor=2)


@forms
@pytest.mark.parametrize("backend", [TRITON])
def test_prefix_attention_with_triton(form, backend):
    options = {"softcap": {}, "sinks": {"window": 20}, "both": {"scale": -0.4, "window": 7}}[form]
    check_prefix(form, GROUPS, (2, 1), 40, backend=backend, **options)  # blocks of 32
    if form == "both":
        check_prefix(form, [(9, [5, 4])], (1, 1), 64, torch.bfloat16, backend=backend, factor=2, **options)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_scores_far_beyond_the_softcap_and_sinks_far_beyond_the_scores(backend):
    """Saturated tanh has no slope; a sink may take all the weight or none, and nothing overflows."""
    segments = Segments.from_lengths([(5, [3, 2])]).to(DEVICE)
    q, k, v = drawn(*[(10, 2, 64)] * 3)
    leaves = [x.requires_grad_() for x in (q * 100, k, v, torch.tensor([1e4, -1e4], device=DEVICE))]
    out = prefix_attention(*leaves[:3], segments, softcap=2.0, sinks=leaves[3], backend=backend)
    plain = reference.prefix_attention(*(x.double() for x in leaves[:3]), segments, softcap=2.0)
    assert (out[:, 0] == 0).all()
    assert_close(out[:, 1], plain[:, 1], torch.float32)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_frozen_sinks_get_no_gradient(backend):
    segments = Segments.from_lengths([(3, [2])]).to(DEVICE)
    q, k, v = (x.requires_grad_() for x in drawn(*[(5, 2, 64)] * 3))
    sinks = torch.zeros(2, device=DEVICE)
    prefix_attention(q, k, v, segments, sinks=sinks, backend=backend).sum().backward()
    assert sinks.grad is None and q.grad is not None


def paged_case(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Contexts of 1, 33 and 17 tokens; the slots past a context hold NaN."""
    table = torch.tensor([[3, -1, -1], [0, 5, 2], [4, 1, -1]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([1, 33, 17], dtype=torch.int32, device=DEVICE)
    q, *pools = drawn((3, heads, size), *[(6, 16, kv_heads, size)] * 2, dtype=dtype)
    for row, length in enumerate(lens.tolist()):
        for pool in pools:
            pool[table[row, (length - 1) // 16], (length - 1) % 16 + 1 :] = float("nan")
    return (q, *pools, table, lens)


def paged_wanted(case: tuple[Tensor, ...], **options) -> Tensor:
    return paged_reference.paged_attention(*(x.double() for x in case[:3]), *case[3:], **options)


@forms
@pytest.mark.parametrize("heads", [(6, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paged_attention_with_torch(form, heads, window, dtype):
    case = paged_case(*heads, 8, dtype)
    options = {"window": window, "softcap": FORMS[form][0], "sinks": sinks_of(form, heads[0])}
    assert_close(paged_attention(*case, backend="torch", **options), paged_wanted(case, **options), dtype)


@forms
@pytest.mark.parametrize("backend", [TRITON])
def test_paged_attention_with_triton(form, backend):
    """One program a sequence and head, and more than the short contexts have tokens for."""
    from macpo.kernels.paged_attention import triton_impl

    dtype = {"softcap": torch.bfloat16, "sinks": torch.float16, "both": torch.float32}[form]
    case, sinks = paged_case(3, 1, 64, dtype), sinks_of(form, 3)
    options = {"window": 20, "softcap": FORMS[form][0], "sinks": sinks}
    expected = paged_wanted(case, **options)
    assert_close(paged_attention(*case, backend="triton", **options), expected, dtype)
    options["sinks"] = None if sinks is None else sinks.float()
    assert_close(triton_impl.paged_attention(*case, splits=2, **options), expected, dtype)


@forms
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 16), ((6, 2), 20), ((2, 1), 128)])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slot_attention(form, heads, size, window, backend):
    lens = torch.tensor([1, 16, 17, 130, 63])
    q, k, v = (x.cpu() for x in drawn((5, heads[0], size), *[(7, heads[1], 140, size)] * 2))
    sinks = sinks_of(form, heads[0])
    options = {
        "scale": 0.3,
        "window": window,
        "softcap": FORMS[form][0],
        "sinks": None if sinks is None else sinks.cpu(),
    }
    expected = reference_slot_attention(q.double(), k.double(), v.double(), lens, **options)
    assert_close(slot_attention(q, k, v, lens, backend=backend, **options), expected, torch.float32)
    if backend == "torch":
        cast = [x.bfloat16() for x in (q, k, v)]
        expected = reference_slot_attention(*(x.double() for x in cast), lens, **options)
        assert_close(slot_attention(*cast, lens, backend=backend, **options), expected, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be above 0, got nan"),
        ({"sinks": torch.zeros(3)}, r"sinks must be floats \[2\], one a query head; got torch.float32 \[3\]"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, r"sinks must be floats \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    q, k = torch.zeros(5, 2, 16), torch.zeros(5, 1, 16)
    table, lens = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    pool = torch.zeros(1, 4, 1, 16)
    for call in (
        lambda: prefix_attention(q, k, k, Segments.from_lengths([(3, [2])]), **options),
        lambda: paged_attention(q, pool, pool, table, lens, **options),
        lambda: slot_attention(q, k[:, None], k[:, None], lens.long(), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_flash_has_no_sinks(monkeypatch):
    monkeypatch.setattr(op, "choose", lambda q, backend: ("flash", "asked for"))
    q = torch.zeros(5, 2, 16)
    with pytest.raises(BackendError, match="backend 'flash' has no attention sinks"):
        prefix_attention(q, q, q, Segments.from_lengths([(3, [2])]), sinks=torch.zeros(2), backend="flash")
