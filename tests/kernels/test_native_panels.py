"""The C++ product of a few rows with a weight in panels (`native.Panels`)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import framed, threads

from macpo.kernels import native

pytestmark = pytest.mark.skipif(not native.has_panels(), reason="needs a CPU with AVX-512")


# n, o, i: one element; every number of rows of a tile; ragged panels of 32; depths past the 128 terms of one sum
@pytest.mark.parametrize("num_rows", [*range(1, 14), 25, 40])
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (31, 127), (32, 128), (70, 300), (97, 129)])
def test_products(num_rows, outputs, width):
    g = torch.Generator().manual_seed(num_rows)
    x, x_frame = framed(torch.randn(num_rows, width, generator=g))
    weight, weight_frame = framed(torch.randn(outputs, width, generator=g))
    bias = torch.randn(outputs, generator=g) if outputs % 2 else None
    panels = native.Panels(weight, bias)
    assert panels.nbytes == 4 * -(-outputs // 32) * 32 * width
    y = panels.product(x)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = 4e-7 * width**0.5 * (x.double().abs() @ weight.double().abs().T).amax()
    assert y.shape == exact.shape and (y - exact).abs().max() <= bound
    assert x_frame().isnan().all() and weight_frame().isnan().all()


def test_a_row_does_not_depend_on_others_or_threads():
    """Bits of a row alone, in any batch, with one thread and with two: a large weight is shared among them."""
    weight, x = torch.randn(700, 333), torch.randn(64, 333)
    panels = native.Panels(weight, torch.randn(700))
    assert weight.numel() > native.PANEL_ELEMENTS
    with threads(2):
        together = panels.product(x)
    with threads(1):
        assert torch.equal(panels.product(x), together)
    for rows in (slice(0, 1), slice(3, 10), slice(20, 33)):
        assert torch.equal(panels.product(x[rows]), together[rows])


def test_the_copy_is_a_copy_and_no_rows_are_nothing():
    weight = torch.randn(40, 20)
    panels, x = native.Panels(weight), torch.randn(3, 20)
    before = panels.product(x)
    weight.zero_()
    assert torch.equal(panels.product(x), before) and before.abs().sum() > 0
    assert panels.product(x[:0]).shape == (0, 40)
    assert torch.equal(
        native.Panels(torch.empty(5, 0), torch.arange(5.0)).product(torch.empty(2, 0)), torch.arange(5.0).expand(2, 5)
    )


def test_numbers_that_are_not_finite_stay_where_they_are():
    weight = torch.ones(33, 4)
    weight[32, 0] = float("inf")
    x = torch.ones(2, 4)
    x[1, 1] = float("nan")
    y = native.Panels(weight).product(x)
    assert y[0].tolist() == [4.0] * 32 + [float("inf")] and y[1].isnan().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="float32"):
        native.Panels(torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias"):
        native.Panels(torch.ones(3, 4), torch.ones(2)).product(torch.ones(1, 4))
    with pytest.raises(ValueError, match="another weight"):
        native.Panels(torch.ones(3, 4)).product(torch.ones(1, 5))
