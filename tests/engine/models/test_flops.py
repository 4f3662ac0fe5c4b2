"""The FLOP formulas against torch's own counter, which sees every matrix product of a real step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, model_of, some_groups
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from macpo.engine.config import LoraSettings
from macpo.engine.data.pack import pack
from macpo.engine.models.flops import Counts, ModelShape, counts_of, forward_flops, model_flops
from macpo.engine.models.tuning import lora
from macpo.kernels.prefix_attention.segments import visible

TOKENS = 24
# every token is multiplied with every key, and every row reaches the head: a plain Hugging Face step
COUNTS = Counts(TOKENS, TOKENS, TOKENS * TOKENS)
SHAPES: dict[str, dict[str, Any]] = ARCHITECTURES | {
    "qwen2": {"num_key_value_heads": 2},
    "phi": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
DENSE = [name for name in SHAPES if name not in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")]


def plain(name: str) -> PreTrainedModel:
    """Attention and experts as single products that the counter sees."""
    model = model_of(name, **SHAPES[name])
    model.set_attn_implementation("eager")
    if name not in DENSE:
        model.set_experts_implementation("eager")
    return model


def counted(model: PreTrainedModel | PeftModel, *, backward: bool) -> int:
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_full_step_are_the_counted_products(name: str) -> None:
    """Experts count for the tokens sent to them; a layer without experts counts its own MLP."""
    model = plain(name)
    shape = ModelShape.of(model.config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert counted(model, backward=False) == forward_flops(shape, COUNTS)
    assert counted(model, backward=True) == model_flops(shape, COUNTS, tuning="full")


@pytest.mark.parametrize("name", DENSE)
def test_lora_step_is_the_counted_products(name: str) -> None:
    """A frozen weight's product with dX alone, none into the first block's input, and the adapters' three."""
    model = lora.new_adapter(plain(name), LoraSettings(rank=4, target_modules="all-linear"), seed=0)
    shape = ModelShape.of(model.get_base_model().config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(4, "all-linear") == trained
    assert counted(model, backward=True) == model_flops(shape, COUNTS, tuning="lora", rank=4)


def test_lora_on_some_modules() -> None:
    """Within 2%: keys of the first block take no gradient here, and eager attention leaves their product out."""
    targets = ("q_proj", "v_proj")
    base = model_of("llama", num_key_value_heads=2, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    base.set_attn_implementation("eager")
    model = lora.new_adapter(base, LoraSettings(rank=4, target_modules=targets), seed=0)
    shape = ModelShape.of(base.config)
    assert shape.adapter_parameters(4, targets) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = model_flops(shape, COUNTS, tuning="lora", rank=4, targets=targets)
    assert counted(model, backward=True) == pytest.approx(expected, rel=0.02)


def test_counts_are_those_of_the_packed_row() -> None:
    groups = some_groups(3)
    (batch,) = pack(groups, max_tokens=10_000)
    counts = counts_of(groups, (6,))
    length = batch.segments.num_tokens
    assert (counts.tokens, counts.rows) == (length, len(batch.target))
    seen = [visible(batch.segments, a, b, w).sum().item() for w in (None, 6) for a, b in spans(batch.segments.bounds)]
    half = len(seen) // 2
    assert counts.attended == sum(seen[:half])
    assert counts.attended_in(6) == sum(seen[half:]) < counts.attended
    parts = [counts_of([group], (6,)) for group in groups]
    assert sum(parts[1:], parts[0]) == counts


def spans(bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


def test_windows_come_from_the_config() -> None:
    assert ModelShape.of(model_of("gemma3_text").config).windows == (5,)
    assert [layer.window for layer in ModelShape.of(model_of("gemma3_text").config).layers] == [5, None]
    assert ModelShape.of(model_of("mistral").config).windows == (6,)
    assert ModelShape.of(model_of("llama").config).windows == ()


def test_head_products() -> None:
    """1u to score, 2u with a frozen head, 3u with a trained one, on response rows alone."""
    shape = ModelShape.of(model_of("llama").config)
    none, some = Counts(10, 0, 55), Counts(10, 4, 55)
    unit = 2 * 4 * 32 * VOCAB
    assert forward_flops(shape, some) - forward_flops(shape, none) == unit
    for tuning, products in (("lora", 2), ("full", 3)):
        flop = [model_flops(shape, c, tuning=tuning, rank=8) for c in (none, some)]  # type: ignore[arg-type]
        assert flop[1] - flop[0] == products * unit
