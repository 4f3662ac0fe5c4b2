"""The C++ extension itself: threads, layouts, and refusals. Its results are checked beside torch's elsewhere."""

from __future__ import annotations

import pytest
import torch

from macpo.kernels import SampleParams, native
from macpo.kernels.linear_logp import rows

pytestmark = pytest.mark.skipif(native.module is None, reason=native.why_absent or "built")


def inputs(num_rows=64, vocab=2500):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab, generator=g) * 3
    assert logits.numel() >= native.PARALLEL_ELEMENTS  # large enough to be split
    index = torch.arange(num_rows)
    keys = torch.stack([index, index % 3, index % 2], 1)
    return logits, torch.randint(vocab, (num_rows,), generator=g), keys, index


def test_threads_do_not_change_a_bit():
    logits, target, keys, positions = inputs()
    params = SampleParams(1, top_k=50, top_p=0.9, batch=len(logits))

    def everything():
        logp, lse = native.row_logp(logits, target)
        gradient = native.row_dlogits_(logits.clone(), target, lse, 0.5, 30.0)
        return [logp, lse, gradient, *native.sample(logits, params, keys, positions)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        shared = everything()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


def test_strided_inputs_are_read_right():
    logits, target, keys, positions = inputs()
    wide = torch.stack([logits, logits + 1], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    for one, other in zip(native.row_logp(wide, target), rows.torch_logp(logits, target), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)
    params = SampleParams(1, batch=len(logits))
    strided = native.sample(wide, params, keys.T.contiguous().T, positions)
    for one, other in zip(strided, native.sample(logits, params, keys, positions), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="contiguous"):
        native.row_dlogits_(wide, target, target.float(), 1.0, None)


def test_a_row_of_minus_infinity_equals_torch():
    logits = torch.full((2, 300), float("-inf"))
    logits[1, 5] = 0.0
    target = torch.tensor([0, 5])
    for one, other in zip(native.row_logp(logits, target), rows.torch_logp(logits, target), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_the_extension_refuses_what_would_read_out_of_bounds():
    logits, target, keys, positions = inputs()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        native.row_logp(logits, target + logits.shape[1])
    with pytest.raises(ValueError, match="one id a row"):
        native.row_logp(logits, target[1:])
    with pytest.raises(ValueError, match="one entry a row"):
        native.sample(logits, SampleParams(1, batch=3), keys, positions)
    with pytest.raises(TypeError):
        native.row_logp(logits.double(), target)
