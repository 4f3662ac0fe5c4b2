"""Tiny random models of the causal-LM families of transformers: 2 layers, hidden size 32, 64 token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 64
# What configurations call their sizes; a family gets those that its own configuration has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "encoder_layers": 1, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "intermediate_size": 48, "n_inner": 48, "d_ff": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "rotary_dim": 8, "sliding_window": 6,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "n_mamba_heads": 4,
    "mamba_d_conv": 4, "ssm_state_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family as `config.json` names it, and what its tiny configuration needs besides SIZES."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What sets it apart from another row of the same family."""

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.note})" if self.note else self.model_type

    @property
    def installed(self) -> bool:
        """Whether the installed transformers knows it."""
        return self.model_type in CONFIG_MAPPING


MIXED = ["sliding_attention", "full_attention"]
GEMMA3N = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED * 2, **GEMMA3N}
MLA = {"num_key_value_heads": 4}  # latent attention expands keys to every head
GEMMA3 = {
    "text_config": {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "layer_types": MIXED,
        "max_position_embeddings": 64,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4, "image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61,
}  # fmt: skip
FAMILIES = (
    Family("afmoe"), Family("apertus"), Family("arcee"), Family("aria_text"), Family("axk1", MLA), Family("bamba"),
    Family("bart"), Family("bert"), Family("biogpt"), Family("bitnet"), Family("bloom"), Family("codegen"),
    Family("cohere"), Family("cohere2"), Family("cohere2_moe"), Family("ctrl"), Family("cwm"),
    Family("deepseek_v2", MLA), Family("deepseek_v3", MLA), Family("deepseek_v32"), Family("deepseek_v4"),
    Family("diffllama"), Family("doge"), Family("dots1"), Family("ernie4_5"), Family("ernie4_5_moe"),
    Family("exaone4"), Family("exaone_moe"),
    Family("falcon", {"alibi": False}, "rope"), Family("falcon", {"alibi": True}, "alibi"),
    Family("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}),
    Family("falcon_mamba"), Family("flex_olmo"), Family("flint"), Family("gemma"), Family("gemma2"),
    Family("gemma3", GEMMA3, "with its vision part"), Family("gemma3_text"),
    Family("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    Family("gemma3n_text", {"num_kv_shared_layers": 0, **GEMMA3N}),
    Family("gemma3n_text", SHARED_KEYS, "shared keys"),
    Family("gemma4_text", {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}),
    Family("glm"), Family("glm4"), Family("glm4_moe"), Family("glm4_moe_lite", MLA), Family("glm_moe_dsa"),
    Family("gpt2"), Family("gpt_bigcode"),
    Family("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 5}),
    Family("gpt_neox"), Family("gpt_neox_japanese"), Family("gpt_oss"), Family("gptj"), Family("granite"),
    Family("granite_swa"), Family("granitemoe"),
    Family("granitemoehybrid"), Family("granitemoehybrid", {"layer_types": ["attention"] * 2}, "attention only"),
    Family("granitemoeshared"), Family("helium"), Family("hrm_text"), Family("hunyuan_v1_dense"),
    Family("hunyuan_v1_moe"), Family("hy_v3"), Family("hyperclovax"), Family("jais2"), Family("jamba"),
    Family("jetmoe"), Family("kimi_linear"), Family("laguna"),
    Family("lfm2", {"layer_types": ["conv", "full_attention"]}), Family("llama"),
    Family("llama4_text"), Family("longcat_flash", MLA), Family("mamba"),
    Family("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}), Family("mellum"), Family("mimo_v2_flash"),
    Family("minicpm3", MLA), Family("minimax"), Family("minimax_m2"), Family("minimax_m3_vl_text"),
    Family("ministral"), Family("ministral3"), Family("mistral"), Family("mixtral"),
    Family("modernbert-decoder"), Family("mpt"),
    Family("nanochat"), Family("nemotron"), Family("nemotron_h"), Family("olmo"), Family("olmo2"), Family("olmo3"),
    Family("olmo_hybrid"), Family("olmoe"), Family("openai-gpt"), Family("opt"), Family("persimmon"), Family("phi"),
    Family("phi3"), Family("phimoe", {"sliding_window": 64}), Family("phimoe", {}, "short window"),
    Family("qwen2"), Family("qwen2_moe"), Family("qwen3"), Family("qwen3_moe"), Family("qwen3_5_text"),
    Family("qwen3_next"), Family("recurrent_gemma"), Family("rwkv"), Family("seed_oss"), Family("smollm3"),
    Family("solar_open"), Family("stablelm"), Family("starcoder2"), Family("t5"), Family("vaultgemma"),
    Family("whisper"), Family("xglm"), Family("xlnet"), Family("xlstm"),
    Family("zamba2", {"layer_types": ["linear_attention", "hybrid"], "n_mamba_heads": 4}),
)  # fmt: skip


def config_of(family: Family) -> PreTrainedConfig:
    """The family's own configuration, shrunk."""
    kind = CONFIG_MAPPING[family.model_type]
    default = kind()
    settable = [name for name in SIZES if _has(default, name) and not isinstance(getattr(kind, name, None), property)]
    sizes = {name: SIZES[name] for name in settable}
    layers = default.__dict__.get("layer_types")
    if layers and not isinstance(getattr(kind, "layer_types", None), property):
        sizes["layer_types"] = [layers[0], layers[-1]]
    return kind(**(sizes | family.changes))


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except (ValueError, RuntimeError):  # an attribute that differs by layer
        return False


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A float32 model in eval mode with random weights whose predictions are far from uniform.

    Buffers that are saved with the weights (DeepSeek's correction of the router) are random too.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # the usual 0.02 would hide errors of attention behind near-zero scores
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model
