"""What TRL, LLaMA-Factory and axolotl call things, and what recipes call them: for the remedies of errors.

A name is looked up in lower case with `_` for `-`. A field stands for every place of the recipe that ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS: Mapping[str, tuple[str, ...]] = {
    field: tuple(names.split())
    for field, names in {
        # model and tuning
        "model": "model_name_or_path model_name base_model model_id pretrained_model_name_or_path model_path",
        "reference_model": "ref_model ref_model_name_or_path ref_model_path",
        "adapter": "adapter_name_or_path lora_model_dir adapter_path",
        "tuning": "finetuning_type peft_config lora use_peft use_lora peft",
        "tuning.rank": "lora_r lora_rank r",
        "tuning.alpha": "lora_alpha",
        "tuning.target_modules": "lora_target lora_target_modules lora_target_linear lora_modules",
        "tuning.quantization": "load_in_4bit quantization_bit bnb_4bit_quant_type quantization_config use_4bit",
        "eos_token": "end_of_text_token",
        # data and tokens
        "data.path": "dataset datasets dataset_name dataset_path train_file train_dataset data_path dataset_dir",
        "data.subset": "dataset_config dataset_config_name",
        "data.split": "dataset_split dataset_train_split train_split",
        "data.test_split": "dataset_test_split eval_split test_split_name",
        "data.test_path": "eval_dataset eval_file validation_file test_dataset test_datasets",
        "data.test_prompts": "val_size val_set_size test_size eval_size max_eval_samples",
        "data.train_prompts": "max_samples max_train_samples num_train_samples",
        "data.long_prompt": "truncation_mode excess_length_strategy",
        "data.columns": "field_messages columns_mapping column_mapping",
        "template": "chat_template chat_template_path conversation_template prompt_template",
        "context_tokens": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length seq_length",
        "prompt_tokens": "max_prompt_length max_prompt_len",
        "sampling.max_new_tokens": "max_completion_length max_tokens max_response_length",
        # optimisation
        "learning_rate": "lr",
        "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
        "batch": "per_device_train_batch_size micro_batch_size train_batch_size batch_size global_batch_size "
        "per_gpu_train_batch_size gradient_accumulation_steps total_batch_size",
        "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
        "warmup_fraction": "warmup_ratio warmup_steps num_warmup_steps warmup",
        "adam_betas": "adam_beta1 adam_beta2 betas",
        "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm max_gradient_norm",
        "save_every_steps": "save_steps saves_per_epoch save_strategy checkpoint_every",
        # losses
        "loss": "loss_type pref_loss dpo_loss rl preference_loss",
        "beta": "pref_beta dpo_beta rl_beta orpo_alpha orpo_beta",
        "label_smoothing": "dpo_label_smoothing label_smoothing_factor cdpo_eps",
        "gamma": "simpo_gamma gamma_beta_ratio target_reward_margin",
        "sft_weight": "pref_ftx dpo_ftx rpo_alpha nll_weight cpo_alpha sft_loss_weight",
        # where and how
        "recipe": "stage task trainer",
        "output": "output_dir save_path out_dir",
        "compute.dtype": "bf16 fp16 torch_dtype pure_bf16 mixed_precision precision",
        "compute.parallel.sharding": "fsdp fsdp_config fsdp_version deepspeed deepspeed_config zero_stage",
        "compute.parallel.tensor": "tensor_parallel_size tp_size",
        "compute.parallel.checkpointing": "gradient_checkpointing gradient_checkpointing_kwargs",
        "compute.parallel.offload_activations": "activation_offloading",
        "compute.parallel.compile": "torch_compile compile_model",
        "compute.parallel.liger": "use_liger_kernel enable_liger_kernel use_liger",
        "compute.trackers": "report_to use_wandb wandb_project use_swanlab use_tensorboard",
    }.items()
}
"""Field -> what others call it."""

NOTES: Mapping[str, str] = {
    "batch": "it is the whole step: per-device size x accumulation steps x GPUs",
    "warmup_fraction": "a share of the steps",
    "data.test_prompts": "a number of prompts",
    "tuning": "write {type: lora, rank: 8} or {type: full}",
    "adam_betas": "both in a list",
    "compute.trackers": "a list such as [wandb]",
    "compute.dtype": "auto, float32 or bfloat16",
    "tuning.quantization": "none or nf4",
    "recipe": "macpo, sft, preference or reward",
}
"""Field -> what differs from the others' meaning."""

NEEDLESS: Mapping[str, str] = {
    name: why
    for why, names in {
        "adapters have no dropout": "lora_dropout",
        "AdamW is the optimiser": "optim optimizer adam_epsilon",
        "rows are always packed, nothing is padded": "packing sample_packing pad_to_sequence_len padding_free "
        "neat_packing group_by_length eval_sample_packing",
        "attention is the engine's own": "attn_implementation flash_attn flash_attention sdp_attention "
        "xformers_attention",
        "responses alone are trained on": "train_on_inputs train_on_prompt mask_history completion_only_loss "
        "assistant_only_loss",
        "reference log-probs are always computed once and kept": "precompute_ref_log_probs",
        "every step is noted in metrics.jsonl": "logging_steps logging_strategy log_level logging_dir plot_loss",
        "the same command resumes by itself": "resume_from_checkpoint auto_resume_from_checkpoints "
        "overwrite_output_dir overwrite_cache",
        "evaluation is a stage of its own, after training": "eval_steps eval_strategy evaluation_strategy "
        "evals_per_epoch per_device_eval_batch_size do_eval eval_batch_size",
        "`macpo run` trains": "do_train",
        "rows are read once": "dataloader_num_workers preprocessing_num_workers dataset_num_proc "
        "dataset_prepared_path dataset_processes remove_unused_columns",
        "kernels are chosen by device": "use_unsloth unsloth tf32",
        "`macpo export` writes the model, and the Hub's own tools upload it": "push_to_hub hub_model_id hub_strategy",
    }.items()
    for name in names.split()
}
"""What others have and recipes need not say -> why."""

_LOSSES = "dpo:sigmoid rdpo:robust robust_dpo:robust slic:hinge slic_hf:hinge dpo_norm:sigmoid_norm"
VALUES: Mapping[str, Mapping[str, str]] = {
    "loss": dict(each.split(":") for each in _LOSSES.split())
    | {"cdpo": "sigmoid, with label_smoothing", "ld_dpo": "sigmoid, with ld_alpha"},
    "schedule": {"constant_with_warmup": "constant, with warmup_fraction", "cosine_with_warmup": "cosine"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16", "float16": "bfloat16", "half": "bfloat16"},
    "type": {"qlora": "lora, with quantization: nf4", "fft": "full", "full_finetune": "full"},
    "quantization": dict.fromkeys(("4", "4bit", "int4", "bnb", "bitsandbytes", "true"), "nf4"),
    "target_modules": dict.fromkeys(("all", "all_linear", "linear"), "all-linear"),
    "sharding": dict.fromkeys(("fsdp", "fsdp2", "full_shard", "zero3", "zero_3"), "shard")
    | dict.fromkeys(("ddp", "no_shard", "none"), "replicate")
    | {"hybrid_shard": "hybrid"},
    "checkpointing": {"true": "full", "false": "off"},
    "device": {"gpu": "cuda", "cuda:0": "cuda, and set CUDA_VISIBLE_DEVICES=0"},
    "recipe": dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "pref", "preference_training"), "preference")
    | dict.fromkeys(("rm", "reward_model", "reward_modeling"), "reward")
    | {"finetune": "sft", "supervised": "sft"},
}
"""Last part of a field -> what others write there -> what recipes write."""

_OURS = {name: field for field, names in FIELDS.items() for name in names}


def field_of(name: str) -> str:
    """The field, or its last parts, that others call by this name; empty where none is known."""
    return _OURS.get(_plain(name), "")


def value_of(field: str, value: Any) -> str:
    """What recipes write in a field, named by its last part, where others write `value`; empty where unknown."""
    return VALUES.get(field, {}).get(_plain(value), "") if isinstance(value, str | int) else ""


def why_needless(name: str) -> str:
    """Why recipes need not say what others call by this name; empty where that is unknown."""
    return NEEDLESS.get(_plain(name), "")


def _plain(name: str | int) -> str:
    return str(name).lower().replace("-", "_")
