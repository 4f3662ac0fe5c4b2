"""What the drop-ins' tests share: a tiny Llama with a word tokenizer, and preference pairs of random words."""

from __future__ import annotations

import random

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "<pad>", "<eos>"]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "pad_token_id": 26, "eos_token_id": 27, "bos_token_id": None,
}  # fmt: skip


def llama(seed: int, factor: float = 4.0) -> LlamaForCausalLM:
    """Weights larger than usual: log-probs and margins that are not all alike."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def text_pairs(count: int, seed: int = 0) -> datasets.Dataset:
    rng = random.Random(seed)
    text = {"prompt": 9, "chosen": 8, "rejected": 8}  # longest part, in words; the shortest has one
    rows = [
        {
            part: "".join(f" {rng.choice(WORDS[:26])}" for _ in range(rng.randint(1, most)))
            for part, most in text.items()
        }
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def id_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{part: [rng.randrange(26) for _ in range(rng.randint(1, 7))] for part in parts} for _ in range(count)]


def logged(history: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in history if name in row]
