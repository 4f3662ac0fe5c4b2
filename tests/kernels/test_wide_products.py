"""16-bit products that a CPU has not: in float32, rounded once, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from macpo.kernels import wide_products
from macpo.kernels.wide_products import MIN_ROWS, is_emulated, wide_linear

SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def has(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken to have 16-bit products."""
    monkeypatch.setattr(wide_products, "EMULATED", frozenset(() if request.param else SIXTEEN))
    return bool(request.param)


def operands(dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    made = (torch.randn(2, rows // 2, 37), torch.randn(23, 37), torch.randn(23), torch.randn(2, rows // 2, 23))
    return tuple(x.to(dtype) for x in made)


def rounded(exact: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Bounds of float32's sums rounded once to `dtype`: half a unit of the last place, and a little."""
    return {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-5 * exact.abs().max().item()}


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_layer_and_its_gradients_are_rounded_once(dtype: torch.dtype, has: bool) -> None:
    x, weight, bias, dy = operands(dtype, 2 * MIN_ROWS)
    layer = nn.Linear(37, 23, dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    given = x.requires_grad_()
    with wide_products.wide_products(dtype, x.device):
        y = layer(given)
    y.backward(dy)
    flat, dy_flat = x.detach().double().flatten(0, 1), dy.double().flatten(0, 1)
    exact = {
        "y": flat @ weight.double().T + bias.double(),
        "dx": dy_flat @ weight.double(),
        "dw": dy_flat.T @ flat,
        "db": dy_flat.sum(0),
    }
    assert given.grad is not None
    got = {"y": y.flatten(0, 1), "dx": given.grad.flatten(0, 1), "dw": layer.weight.grad, "db": layer.bias.grad}
    assert is_emulated(dtype, x.device) == (not has)
    for name, value in exact.items():
        if has:  # torch's own, whose sums may be rounded on the way
            torch.testing.assert_close(got[name].double(), value, rtol=0.05, atol=0.1)
        else:
            torch.testing.assert_close(got[name].double(), value, **rounded(value, dtype))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_is_the_layer(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_products, "EMULATED", frozenset(SIXTEEN))
    x, weight, bias, dy = operands(torch.bfloat16, 2 * MIN_ROWS)
    layer = nn.Linear(37, 23, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight, "bias": bias})
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    found = []
    for run in (layer, compiled):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        with wide_products.wide_products(torch.bfloat16, x.device):
            y = run(given)
        y.backward(dy)
        found.append((y, given.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_kept_and_counted_is_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 copy lives on to the backward, and a counter sees the three products."""
    monkeypatch.setattr(wide_products, "EMULATED", frozenset(SIXTEEN))
    x, weight, bias, dy = (t.requires_grad_() for t in operands(torch.bfloat16, 2 * MIN_ROWS))
    kept: list[Tensor] = []
    keep = saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    with keep, FlopCounterMode(display=False) as counter:
        wide_linear(x, weight, bias).backward(dy.detach())
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, weight)}
    assert counter.get_total_flops() == 3 * 2 * (2 * MIN_ROWS) * 37 * 23


def test_few_rows_and_other_dtypes_are_left_alone(has: bool) -> None:
    called: list[torch.dtype] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is linear:
                called.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    few, many = torch.randn(MIN_ROWS - 1, 37), torch.randn(MIN_ROWS, 37)
    weight = torch.randn(23, 37)
    with Watch():
        wide_linear(few.bfloat16(), weight.bfloat16())
        wide_linear(many.double(), weight.double())
        wide_linear(many, weight)
    assert called == [torch.bfloat16, torch.float64, torch.float32]
    assert not is_emulated(torch.float32, many.device) and not is_emulated(torch.bfloat16, torch.device("meta"))
