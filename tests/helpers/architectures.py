"""Random two-layer models of the architectures that the engine's equalities are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from macpo.engine.data.groups import PrefixGroup

VOCAB = 61  # odd, so that nothing is aligned by luck
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Grouped-query attention where the family has it; windows shorter than the test prompts where it slides.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {  # a softcap of the scores, which are about 1
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {  # sinks, and experts with biases; heads of 16, for which decoding has native code
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {},
}


def model_of(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode whose logits are far from uniform."""
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(SIZES | ARCHITECTURES.get(name, {}) | changes))
    capped = (
        {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    )  # SDPA drops it
    model = AutoModelForCausalLM.from_config(config, **capped).float().eval()
    with torch.no_grad():  # the default init of 0.02 would hide attention errors behind near-zero scores
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def some_groups(num_responses: int = 2, count: int = 4, seed: int = 0) -> list[PrefixGroup]:
    """Ragged groups: prompts of 1 and of more tokens than the windows, responses of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    prompts = [11, 1, 7, 4, 9, 2]
    lengths = [3, 9, 1, 6, 5, 2, 8, 4]
    return [
        PrefixGroup(ids(prompts[g % 6]), [ids(lengths[(g * num_responses + r) % 8]) for r in range(num_responses)])
        for g in range(count)
    ]


def separate_logps(model: PreTrainedModel, groups: list[PrefixGroup]) -> list[torch.Tensor]:
    """Token log-probs of every response from one right-padded Hugging Face forward of whole sequences."""
    sequences = [(g.prompt_ids + r, len(g.prompt_ids)) for g in groups for r in g.responses]
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences])
    logps = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    out = []
    for row, (ids, prompt) in enumerate(sequences):
        targets = torch.tensor(ids[prompt:])
        out.append(logps[row, prompt - 1 : len(ids) - 1].gather(1, targets[:, None])[:, 0])
    return out


def save_byte_model(folder: Path, *, verdict_tokens: bool = False, positions: int = 4096, seed: int = 0) -> Path:
    """A random Llama that reads any text byte by byte; `verdict_tokens`: `[[A` and `[[B` are one token each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}
    merges = [("[", "["), *([("[[", "A"), ("[[", "B")] if verdict_tokens else [])]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    raw = Tokenizer(models.BPE(vocab, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    ids = {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model_of("llama", seed, **ids, max_position_embeddings=positions).save_pretrained(folder)
    return folder
