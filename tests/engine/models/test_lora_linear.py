"""LoRA's own product beside peft's forward and float64: values, gradients, what is kept, and where it steps aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of
from parallel_cases import LORA, PAIRS, Case, policy_of
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from macpo.engine.config import LoraSettings, ParallelSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.models.flops import Counts, ModelShape, model_flops
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.tuning import lora, lora_linear
from macpo.engine.models.tuning.lora_linear import FusedLinear, use_fused_lora
from macpo.engine.planning.dry_run import Recorder
from macpo.engine.training.objectives import sft
from macpo.kernels import wide_products

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SIZES = [(1, 24, 40, 3), (37, 33, 17, 1), (130, 64, 48, 8)]  # T, I, O, r: one token; odd and rank 1; many tokens


def layer_of(
    base: nn.Module | None = None, dtype: torch.dtype = torch.float32, rank: int = 3, **config: Any
) -> FusedLinear:
    """An adapted layer whose adapter adds about a quarter of what the base gives, as after training."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"proj": base or nn.Linear(24, 40)}).to(dtype).requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"], init_lora_weights=False, **config)
    inject_adapter_in_model(settings, host)
    use_fused_lora(host)
    layer: Any = host["proj"].eval()
    assert type(layer) is FusedLinear
    layer.lora_A.float(), layer.lora_B.float()  # as peft's get_peft_model does
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(std=layer.in_features**-0.5)
        layer.lora_B["default"].weight.normal_(std=rank**-0.5 / 14)
    return layer


def results(layer: PeftLinear, x: Tensor, dy: Tensor, forward: Callable[..., Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.grad = b.grad = None
    y = forward(layer, x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}
    assert all(tensor is not None for tensor in found.values())
    return found  # type: ignore[return-value]


def exact(layer: PeftLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The formula in float64."""
    base: Any = layer.get_base_layer()
    weights = (base.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    w, a, b = (weight.detach().double().requires_grad_() for weight in weights)
    x = x.double().requires_grad_()
    bias = None if base.bias is None else base.bias.double()
    y = functional.linear(x, w, bias) + layer.scaling["default"] * (x @ a.T) @ b.T
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.double())
    return {"y": y.detach(), "dx": dx, "dA": da, "dB": db}


def scales(layer: PeftLinear, x: Tensor, dy: Tensor, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Norms: of y and dx, and those that dA and dB have where the signs of their terms are independent. A sum over few
    terms that happens to cancel is no measure of their roundings."""
    a, b = layer.lora_A["default"].weight.double() ** 2, layer.lora_B["default"].weight.double() ** 2
    x, dy = x[0].double() ** 2, dy[0].double() ** 2
    squares = {"dA": ((dy @ b).T @ x).sum(), "dB": (dy.T @ (x @ a.T)).sum()}
    scaling = layer.scaling["default"]
    found = {key: wanted[key].norm().item() for key in ("y", "dx")}
    return found | {key: scaling * square.sqrt().item() for key, square in squares.items()}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor], norms: dict[str, float]) -> dict[str, float]:
    return {key: (found[key].double() - w).norm().item() / norms[key] for key, w in wanted.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, inputs, outputs, rank", SIZES)
def test_values_and_gradients_against_float64(
    tokens: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype, bias: bool, device: str
) -> None:
    """y and dx are as near as peft's. In bfloat16 dA and dB have three roundings that peft's have not: of A or B, of u
    or du, and on a CPU of the sum. Each adds 1.7e-3 of the norm in quadrature, 2.9e-3 in all."""
    layer = layer_of(nn.Linear(inputs, outputs, bias=bias), dtype, rank).to(device)
    x, dy = (torch.randn(1, tokens, size).to(device, dtype) for size in (inputs, outputs))
    found = results(layer, x, dy, FusedLinear.forward)
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        "y": dtype,
        "dx": dtype,
        "dA": torch.float32,
        "dB": torch.float32,
    }
    wanted = exact(layer, x, dy)
    norms = scales(layer, x, dy, wanted)
    ours, peft = errors(found, wanted, norms), errors(results(layer, x, dy, PeftLinear.forward), wanted, norms)
    for key in wanted:
        if dtype == torch.float32:
            assert ours[key] < 5e-7, (key, ours)
        elif key in ("y", "dx"):
            assert ours[key] < 1.5 * peft[key], (key, ours, peft)
        else:
            assert ours[key] < 2**-8, (key, ours)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_bfloat16_models_gradients_are_as_near_to_float64_as_by_peft(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All adapters' gradients together, where x and dy are rounded anyway."""
    case = Case(architecture, "all-linear", dtype=torch.bfloat16)
    (batch,) = pack(PAIRS, max_tokens=1 << 20)

    def gradient(fused: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        monkeypatch.setattr(
            "macpo.engine.models.policy.use_fused_lora", use_fused_lora if fused else lambda model: None
        )
        policy = policy_of(case)
        if dtype == torch.float64:
            policy.double()
        assert any(type(module) is FusedLinear for module in policy.modules()) == fused
        sft()(policy, batch, len(PAIRS))[0].backward()
        grads = [p.grad for p in policy.trainable_parameters().values()]
        return torch.cat([grad.double().flatten() for grad in grads if grad is not None])

    wanted = gradient(False, torch.float64)
    assert (gradient(True) - wanted).norm() < 1.5 * (gradient(False) - wanted).norm()


def kept_by(run: Callable[[], Any], weights: nn.Module) -> list[Tensor]:
    """The tensors that autograd saves beside the weights."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run()
    own = {p.untyped_storage().data_ptr() for p in weights.parameters()}
    return [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]


def test_x_as_it_is_and_u_are_all_that_is_kept() -> None:
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(1, 50, 24, dtype=torch.bfloat16, requires_grad=True)
    first, second = kept_by(lambda: layer(x), layer)
    assert first.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (second.shape, second.dtype) == ((50, 3), torch.bfloat16)


def test_no_second_output_and_no_second_gradient_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has 16-bit products; else they are in float32."""
    monkeypatch.setattr(wide_products, "EMULATED", frozenset())
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(1, 512, 24, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(1, 512, 40, dtype=torch.bfloat16)
    u_bytes, b_bytes = 512 * 3 * 2, 40 * 3 * 2
    with Recorder((*layer.parameters(), x, dy)) as recorder:
        y = layer(x)
        assert recorder.live == y.nbytes + u_bytes
        assert recorder.peak == recorder.live + b_bytes, "B in bfloat16, on the way"
        recorder.peak = before = recorder.live
        y.backward(dy)
        # dx, du, and factors and their gradients in two dtypes at most
        assert recorder.peak <= before + x.nbytes + u_bytes + 3 * 4 * 3 * (24 + 40)


def test_q_k_and_v_keep_one_input() -> None:
    policy = policy_of(Case("llama", "all-linear", dtype=torch.bfloat16))
    attention: Any = policy.base.base_model.layers[0].self_attn
    x = torch.randn(1, 9, attention.q_proj.in_features, dtype=torch.bfloat16, requires_grad=True)
    kept = kept_by(lambda: [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], policy)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sorted(sizes.values()) == [9 * 4 * 2] * 3 + [x.nbytes]


def test_an_input_that_takes_no_gradient_costs_none() -> None:
    """The first block's inputs need none, which saves the products of dy with W and of du with A."""
    layer, x = layer_of(), torch.randn(1, 50, 24)

    def backward_flops(x: Tensor) -> int:
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    adapter = 2 * 50 * 3 * (40 + 40 + 24)
    assert backward_flops(x) == adapter
    assert backward_flops(x.requires_grad_()) == adapter + 2 * 50 * 24 * (40 + 3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_counter_sees_every_product(name: str) -> None:
    """Layers without and with a bias."""
    base = model_of(name)
    base.set_attn_implementation("eager")
    wrapped = lora.new_adapter(base, LoraSettings(rank=4, target_modules="all-linear"), seed=0)
    use_fused_lora(wrapped)
    with FlopCounterMode(display=False) as counter:
        wrapped(input_ids=torch.arange(3, 27)[None], use_cache=False).logits.sum().backward()
    counts = Counts(24, 24, 24 * 24)  # eager attention multiplies every query with every key
    assert counter.get_total_flops() == model_flops(ModelShape.of(base.config), counts, tuning="lora", rank=4)


# --- where peft's own forward runs ---


class Packed(nn.Linear):
    """A linear layer whose weight may be anything, like a quantised one."""


def two_adapters(layer: FusedLinear) -> None:
    layer.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2, init_lora_weights=False))
    layer.set_adapter(["default", "other"])


def trained(parameter: str) -> Callable[[FusedLinear], Any]:
    return lambda layer: layer.get_parameter(parameter).requires_grad_()


LAYERS: dict[str, tuple[Callable[[], FusedLinear], Callable[[FusedLinear], Any]]] = {
    "two adapters": (layer_of, two_adapters),
    "no adapter": (layer_of, lambda layer: layer.set_adapter([])),
    "disabled": (layer_of, lambda layer: layer.enable_adapters(False)),
    "merged": (layer_of, lambda layer: layer.merge()),
    "trained base": (layer_of, trained("base_layer.weight")),
    "trained bias": (layer_of, trained("base_layer.bias")),
    "dropout": (lambda: layer_of(lora_dropout=0.1), lambda layer: None),
    "DoRA": (lambda: layer_of(use_dora=True), lambda layer: None),
    "bias of the adapter": (lambda: layer_of(lora_bias=True), lambda layer: None),
    "another linear layer": (lambda: layer_of(Packed(24, 40)), lambda layer: None),
    "transposed weight": (lambda: layer_of(Conv1D(40, 24), fan_in_fan_out=True), lambda layer: None),
}


def refuse(*_: Any) -> Tensor:
    raise AssertionError("the product ran")


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_plain_lora_runs_through_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change = LAYERS[name]
    layer, x = make(), torch.randn(1, 5, 24)
    change(layer)
    monkeypatch.setattr(lora_linear, "lora_linear", refuse)
    assert torch.equal(layer(x), PeftLinear.forward(layer, x))


def test_arguments_and_autocast_are_pefts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), torch.randn(2, 5, 24)
    monkeypatch.setattr(lora_linear, "lora_linear", refuse)
    mixed = layer(x, adapter_names=["default", "__base__"])
    assert torch.equal(mixed[1], layer.base_layer(x)[1]) and not torch.equal(mixed[0], layer.base_layer(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="the product ran"):
        layer(x)


def test_a_disabled_adapter_is_the_base_to_the_bit() -> None:
    layer, x = layer_of(dtype=torch.bfloat16), torch.randn(1, 5, 24, dtype=torch.bfloat16)
    with_adapter = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x)) and not torch.equal(layer(x), with_adapter)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), with_adapter)


def test_a_second_derivative_is_refused() -> None:
    layer, x = layer_of(), torch.randn(1, 5, 24, requires_grad=True)
    (dx,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- under the rest of the engine ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_are_exact_at_every_length(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    compiled = torch.compile(FusedLinear.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9, 33):
        x, dy = (torch.randn(1, tokens, size).to(dtype) for size in (24, 40))
        plain, found = (results(layer, x, dy, forward) for forward in (FusedLinear.forward, compiled))
        assert all(torch.equal(found[key], tensor) for key, tensor in plain.items()), tokens
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_repeats_no_product_and_keeps_only_results(dtype: torch.dtype) -> None:
    (batch,) = pack(PAIRS, max_tokens=1 << 20)
    products, live, grads = {}, {}, {}
    for kind in ("off", "selective", "full"):
        settings = ParallelSettings.model_validate({"checkpointing": kind})
        policy = parallelize(policy_of(Case("llama", "all-linear", dtype=dtype)), settings, World())
        sft()(policy, batch, 1)[0].backward()  # makes the masks, which all steps share
        with FlopCounterMode(display=False) as counter:
            sft()(policy, batch, 1)[0].backward()
        counts = counter.get_flop_counts()["Global"]
        products[kind] = sum(flops for op, flops in counts.items() if "mm" in str(op) or "lora_linear" in str(op))
        grads[kind] = [p.grad for p in policy.trainable_parameters().values()]
        with Recorder(tuple(policy.parameters())) as recorder:
            loss = sft()(policy, batch, 1)[0]
            live[kind] = recorder.live
        del loss
    assert products["off"] == products["selective"] < products["full"]
    for kind in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(grads["off"], grads[kind], strict=True))  # type: ignore[arg-type]
    tokens, layers = batch.input_ids.numel(), [m for m in policy.modules() if isinstance(m, FusedLinear)]
    kept = sum(tokens * (layer.out_features + layer.r["default"]) * dtype.itemsize for layer in layers)
    assert live["selective"] - live["full"] == kept


def test_a_gpus_gradients_of_factors_are_never_rounded() -> None:
    """Counts the operator that runs for CUDA's 16-bit tensors, on tensors without memory."""
    seen: list[Any] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(5, 8, dtype=torch.bfloat16, device="cuda")
        with Noted():
            assert lora_linear._mm(x.t(), x, torch.float32).dtype == torch.float32
    assert torch.ops.aten.mm.dtype in seen and torch.ops.aten._to_copy.default not in seen


def test_files_are_pefts_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fused in (("ours", True), ("peft", False)):
        monkeypatch.setattr(
            "macpo.engine.models.policy.use_fused_lora", use_fused_lora if fused else lambda model: None
        )
        lora.save_adapter(policy_of(LORA).model, tmp_path / name, base_name="base")  # type: ignore[arg-type]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
