"""A frozen base in 4 bits (NF4): how it is asked for, and, where bitsandbytes is installed, that it trains."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from macpo.engine.config import LoraSettings, OptimSettings, ParallelSettings, Tuning
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import loading
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.planning.headers import inspect
from macpo.engine.scoring import score
from macpo.engine.training.objectives import sft
from macpo.engine.training.optim import Optimizer

NF4 = LoraSettings(rank=4, target_modules="all-linear", quantization="nf4")
PAIRS = some_groups(num_responses=2, count=6)
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of at least one block of 64 numbers a row."""
    path = tmp_path_factory.mktemp("base")
    model_of("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def test_without_bitsandbytes_it_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ConfigError, match="quantization nf4 needs bitsandbytes") as caught:
        ModelCache().policy(PolicyRef(str(folder)), NF4)
    assert "macpo[quant]" in str(caught.value)


def test_what_is_asked_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    asked = loading._in_4_bits(torch.float32, torch.device("cpu"))
    config = asked["quantization_config"]
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_storage) == (torch.float32, torch.bfloat16)
    read: Tuning = TypeAdapter(Tuning).validate_python({"type": "lora", "quantization": "nf4"})
    assert isinstance(read, LoraSettings) and read.quantization == "nf4"


def nf4_policy(folder: Path, *, spread: bool = False) -> PolicyModule:
    return ModelCache().policy(PolicyRef(str(folder)), NF4, seed=1, spread=spread)


def steps(policy: PolicyModule, world: World) -> list[float]:
    """Losses of three steps on all pairs."""
    optimizer = Optimizer(policy.trainable_parameters(), OptimSettings(learning_rate=1e-2))
    (batch,) = pack(PAIRS, max_tokens=1 << 20, indices=range(world.rank, len(PAIRS), world.size))
    total = sum(group.num_response_tokens for group in PAIRS)
    losses = []
    for _ in range(3):
        stats = torch.zeros(1)
        loss, _ = sft()(policy, batch, total)
        loss.backward()
        stats += loss.detach()
        norm = optimizer.reduce(world, stats).item()
        optimizer.update(1e-2, norm)
        losses.append(stats.item())
    return losses


@needs_bitsandbytes
def test_a_4_bit_base_trains_an_adapter(folder: Path) -> None:
    policy = nf4_policy(folder)
    plain = load_causal_lm(folder)
    small = [p for name, p in policy.model.named_parameters() if name.endswith("base_layer.weight")]
    whole = [p for name, p in plain.named_parameters() if "_proj" in name]
    assert len(small) == len(whole) == 14 and {p.dtype for p in small} == {torch.bfloat16}
    assert sum(p.nbytes for p in small) * 8 == sum(p.nbytes for p in whole)
    near = score(policy, PAIRS)[0][0].sum_logp
    exact = score(PolicyModule(plain), PAIRS)[0][0].sum_logp
    assert 0 < abs(near - exact) < 0.2 * abs(exact), "rounded, but the same model"
    before = [p.data.view(torch.int16).clone() for p in small]  # as numbers, some of the bits are NaN
    losses = steps(policy, World())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p.data.view(torch.int16), old) for p, old in zip(small, before, strict=True))


@needs_bitsandbytes
def test_a_4_bit_base_is_sharded(folder: Path, tmp_path: Path) -> None:
    alone = steps(nf4_policy(folder), World())

    def body(world: World) -> None:
        policy = parallelize(nf4_policy(folder, spread=True), ParallelSettings(sharding="shard"), world)
        packed = [p for name, p in policy.model.named_parameters() if name.endswith("base_layer.weight")]
        assert all(isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel() for p in packed)
        assert steps(policy, world) == pytest.approx(alone, rel=1e-5)
        with pytest.raises(ConfigError, match="Linear4bit, which cannot be split"):
            parallelize(nf4_policy(folder, spread=True), ParallelSettings(tensor=2), world)

    assert ranks(2, body) == [0, 0]


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_mxfp4_weights_are_unpacked_exactly(tmp_path: Path) -> None:
    """As gpt-oss is published: two numbers a byte and a power of two for each 32 (OCP Microscaling Formats, 1.0)."""
    model_of("gpt_oss", intermediate_size=32).save_pretrained(tmp_path)
    tensors, wanted = load_file(tmp_path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        count, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (count, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 128, (count, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = torch.cat((FP4, -FP4))[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
        wanted[name] = (numbers * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"MXFP4 already.*Fix: set quantization to none"):
        load_causal_lm(tmp_path, quantization="nf4")
    loaded = load_causal_lm(tmp_path)
    assert inspect(tmp_path).num_parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, weight in wanted.items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    loaded.save_pretrained(tmp_path / "again")  # whole, and says so
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = load_causal_lm(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in loaded.state_dict().items())
