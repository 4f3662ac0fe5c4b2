"""Packed linear layers: the same products, for as long as the block lasts, where they are worth it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from macpo.engine.generation.slots import packed_linear
from macpo.engine.generation.slots.packed_linear import packed_linears
from macpo.kernels import native

STEPS = packed_linear.MIN_STEPS
WAYS = [
    pytest.param(True, marks=pytest.mark.skipif(not native.has_panels(), reason="needs a CPU with AVX-512")),
    pytest.param(False, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="has no oneDNN")),
]


@pytest.fixture(autouse=True, params=WAYS, ids=["panels", "onednn"])
def panels(request, monkeypatch):
    """Whether float32 goes through panels; every size is large enough."""
    monkeypatch.setattr(packed_linear, "MIN_ELEMENTS", 1)
    can = native.has_panels() and request.param
    monkeypatch.setattr(native, "has_panels", lambda: can)
    return request.param


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 56), nn.Linear(56, 24, bias=False)).to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("shape", [(1, 40), (5, 40), (1, 33, 40), (2, 3, 40)])
@torch.no_grad()
def test_products_are_the_same(dtype, bound, shape, panels):
    if dtype not in packed_linear.packed_dtypes():
        pytest.skip("oneDNN has no bfloat16 product on this CPU")
    model = layers(dtype)
    x = torch.randn(*shape).to(dtype)
    exact = model.double()(x.double())
    model = layers(dtype)
    with packed_linears(model, STEPS) as num_bytes:
        whole = 40 * 64 + 56 * 32 if panels and dtype == torch.float32 else 40 * 56 + 56 * 24
        assert num_bytes == dtype.itemsize * whole
        assert all("forward" in vars(layer) for layer in model)
        y, strided = model(x), model(x.repeat_interleave(2, -1)[..., ::2])
    assert y.dtype == dtype and y.shape == exact.shape and torch.equal(y, strided)
    assert (y - exact).abs().max() <= bound * exact.abs().max()
    assert not any("forward" in vars(layer) for layer in model)


@torch.no_grad()
def test_a_dtype_without_a_packed_product_stays_plain(monkeypatch):
    """oneDNN on a CPU without AVX-512 refuses bfloat16: generation would crash."""
    monkeypatch.setattr(packed_linear, "packed_dtypes", lambda: {torch.float32})
    model, x = layers(torch.bfloat16), torch.randn(5, 40).bfloat16()
    with packed_linears(model, STEPS) as num_bytes:
        assert num_bytes == 0 and not any("forward" in vars(layer) for layer in model)
        model(x)


@torch.no_grad()
def test_many_rows_take_the_plain_product(monkeypatch):
    model, x = layers(), torch.randn(7, 40)
    few = packed_linear.MAX_PANEL_ROWS
    with packed_linears(model, STEPS):
        before = model(x)
        monkeypatch.setattr(packed_linear, "MAX_PANEL_ROWS", 6)
        after = model(x)
    assert few >= 64 and torch.allclose(before, after, atol=1e-5) and torch.allclose(after, model(x), atol=1e-5)


@torch.no_grad()
def test_a_changed_weight_is_packed_anew():
    model, x = layers(), torch.randn(3, 40)
    with packed_linears(model, STEPS):
        before = model(x)
    model[0].weight.data.mul_(2)  # a change that no version counter sees
    with packed_linears(model, STEPS):
        after = model(x)
    assert torch.allclose(after, model(x), atol=1e-5) and not torch.allclose(after, before, atol=1e-2)


@torch.no_grad()
def test_what_is_left_alone(monkeypatch):
    """Few steps, small weights, float64, layers that somebody has patched, and what no longer fits the memory."""
    model = layers()

    def packed(model: nn.Module, steps: int = STEPS) -> list[bool]:
        with packed_linears(model, steps):
            return ["forward" in vars(layer) for layer in model]

    assert packed(model, STEPS - 1) == [False, False]
    assert packed(layers(torch.float64)) == [False, False]
    monkeypatch.setattr(packed_linear, "MIN_ELEMENTS", 56 * 24 + 1)
    assert packed(model) == [True, False]
    monkeypatch.setattr(packed_linear, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(packed_linear, "_bytes_at_most", lambda: 4 * 40 * 64)
    assert packed(model) == [True, False]
    model[0].forward = lambda x: x
    with packed_linears(model, STEPS):
        assert model[0](torch.ones(1, 40)).sum() == 40
    assert "forward" in vars(model[0])


@torch.no_grad()
def test_lora_layers_go_through_their_packed_base():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(1, 9)[None]
    expected = model(input_ids=ids).logits
    with packed_linears(model, STEPS) as num_bytes:
        assert num_bytes > 0
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_error_leaves_no_copies():
    model = layers()
    with pytest.raises(RuntimeError, match="inside"), packed_linears(model, STEPS):
        raise RuntimeError("inside")
    assert not any("forward" in vars(layer) for layer in model)
