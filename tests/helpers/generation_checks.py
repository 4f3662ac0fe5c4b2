"""What the generation tests compare with: Hugging Face's own loop, teacher forcing, and a tokenizer of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from architectures import VOCAB, model_of
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from macpo.engine.generation import Generator, Output, Sample, SamplingParams

TIE = 1e-4


def some_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def hf_greedy(
    model: PreTrainedModel, prompt: list[int], max_new_tokens: int, eos: int, penalty: float = 1.0
) -> list[int]:
    """New tokens of the model's own generate, one prompt at a time, without the EOS."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0, repetition_penalty=penalty
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()
    model.generation_config = own
    return out[:-1] if out and out[-1] == eos else out


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """float32 logits [len(tokens) + 1, V]: row t predicts token t; the last row what would come next."""
    return model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 :].float()


def assert_greedy_equal(model: PreTrainedModel, prompt: list[int], got: Sample, wanted: list[int], eos: int) -> None:
    """Equal, or at the first difference the two best logits are a tie."""
    ours = got.token_ids + ([eos] if got.finish_reason == "stop" else [])
    theirs = [*wanted, eos]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert got.token_ids == wanted
        return
    best = teacher_forced(model, prompt, wanted[:at])[at].topk(2).values
    assert float(best[0] - best[1]) < TIE, f"differs at token {at}: {got.token_ids} instead of {wanted}"


def ids_of(model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, **options: int) -> list[list[int]]:
    """Token ids of all samples of all prompts, flat."""
    outputs = Generator(model, **options).generate(prompts, params)  # type: ignore[arg-type]
    return [sample.token_ids for output in outputs for sample in output.samples]


def character_tokenizer(size: int = 50) -> PreTrainedTokenizerFast:
    """Token i > 2 spells one or two characters ("a", "b", ..., "aa", "ab", ...); 3 is a blank; 0..2 are special."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<s>", "</s>", " ", *letters, *(f"{a}{b}" for a in letters for b in letters)][:size]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


SPARSE_IDS = [1, 2, 3, 5, 8, 13, 14, 21, 34, 59]
"""Ids of `sparse_tokenizer` in a model of VOCAB columns: holes at the start, between and at the end; 59 ends a text."""


def sparse_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the ids SPARSE_IDS, as where tokens were removed and others added far above."""
    words = {f"w{i} ": i for i in SPARSE_IDS[:-1]} | {"</s>": SPARSE_IDS[-1]}
    raw = Tokenizer(models.WordLevel(words, unk_token="w1 "))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


NAMES = ["default", "wide", "odd"]


def three_adapters(sizes: Mapping[str, int] = MappingProxyType({}), **options: object) -> PeftModel:
    """Ranks, scalings and target modules that differ; "odd" leaves out what the others have."""
    peft = get_peft_model(model_of("llama", **sizes), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    peft.add_adapter("wide", LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "down_proj"], use_rslora=True))
    peft.add_adapter("odd", LoraConfig(r=1, lora_alpha=4, target_modules=["o_proj"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=generator, std=0.5)
    return peft.eval()


def assert_equal(ours: list[Output], slots: list[Output]) -> None:
    """The same tokens, bit for bit, and log-probs to float32's rounding."""
    for mine, theirs in zip(ours, slots, strict=True):
        for a, b in zip(mine.samples, theirs.samples, strict=True):
            assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
            assert a.raw_logps == pytest.approx(b.raw_logps, abs=2e-5)
            assert a.logps == pytest.approx(b.logps, abs=2e-5)
