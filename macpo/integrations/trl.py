"""DPO in TRL with shared prompts and a fused head: one line of a TRL script changes.

    from macpo.integrations.trl import FusedDPOTrainer as DPOTrainer
    trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=..., processing_class=...)

Data preparation, optimiser, logging and checkpoints are TRL's (1.16). The loss is the same number, computed from one
packed row in which chosen and rejected share their prompt, and only response tokens reach the head.

B pairs of a micro-batch, L padded length, N response tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import use_adapter

from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.head import Head, pair_loss
from macpo.integrations.packed import (
    check_held,
    check_model,
    common_refusals,
    enable,
    no_autocast,
    pack_in_order,
    padded_groups,
    refuse,
    response_logps,
)
from macpo.kernels import sequence_sums
from macpo.kernels.pair_loss.losses import DESENSITISED, LOSSES, LossSettings, PairScores

__all__ = ["FusedDPOTrainer"]

_NAME = "FusedDPOTrainer"
_SFT = "sft"  # TRL's: the mean over the chosen tokens of the micro-batch
_LOSSES = {"sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"} & set(LOSSES)  # the same formulas as TRL's
_SMOOTHED = {"robust"}  # the only losses of ours that label_smoothing changes in TRL
# Settings of DPOConfig that are read here or by what stays of TRL. A later TRL may add one that changes the loss;
# unless it is listed here, setting it is refused.
_KNOWN = frozenset(
    {
        *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc"),
        *("max_length", "truncation_mode", "padding_free", "pad_to_multiple_of", "precompute_ref_log_probs"),
        *("precompute_ref_batch_size", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type"),
        *("f_alpha_divergence_coef", "label_smoothing", "beta", "use_weighting", "discopop_tau", "pad_token"),
        *("activation_offloading", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    }
)
_COLUMNS = frozenset({"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"})


class _Output(NamedTuple):
    """Loss with gradient, and detached [B] float32."""

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class FusedDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with packed shared prompts and `pair_loss`; the same arguments.

    Honoured: loss_type "sigmoid", "ipo", "hinge", "robust", "sigmoid_norm" and "sft", alone or weighted in a list;
    beta; label_smoothing as TRL uses it; ld_alpha; every source of the reference (a model, the base under an adapter,
    a frozen copy of the adapter, precomputed log-probs), sync_ref_model, gradient checkpointing and accumulation,
    mixed precision, DDP, evaluation.

    Logged as TRL logs them: rewards/*, logps/*, num_tokens. Not logged, because they need every logit: logits/chosen,
    logits/rejected, entropy, mean_token_accuracy.

    Raises:
        ConfigError: at construction, one line naming the setting, for everything else.
    """

    args: Any  # a DPOConfig
    model: Any  # PreTrainedModel or PeftModel

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any) -> None:
        if args is not None:
            _check_config(args)
        super().__init__(model, ref_model, args, **kwargs)
        refuse(
            _NAME,
            [
                *common_refusals(self.args),
                (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed or FSDP is on", "use DDP"),
                (self._is_vlm, "vision models: images are not packed", "pass a tokenizer and a text model"),
                (
                    self.aux_loss_enabled,
                    "the router's auxiliary loss of a mixture of experts",
                    "set router_aux_loss_coef=0.0",
                ),
            ],
        )
        self._kept: dict[str, list[Tensor]] = {"train": [], "eval": []}
        for each in (self.model, self.ref_model):
            if each is not None:
                check_model(_NAME, each)
                enable(each)
        if not self.args.accelerator_config.dispatch_batches:  # dispatched batches hold tensors only
            self.data_collator = _Packing(self.data_collator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with attention_hook(enable(self.model)):  # until the backward is over: checkpointed layers run again in it
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the micro-batch's pairs; with `return_outputs` also logits, by a second forward."""
        batch = _packed(inputs)
        if model.training:
            check_held(enable(self.model))
        if self.precompute_ref_logps:
            refs = torch.stack((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]), 1).flatten()
        else:
            refs = self._reference_sums(batch)
        out: _Output = model(packed=batch, reduce=_loss_function(self.args, refs))
        self._note("train" if self.model.training else "eval", inputs["attention_mask"], out)
        if not return_outputs:
            return out.loss
        with torch.no_grad():
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return out.loss, model(**ids, use_cache=False)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return summed log-probs of chosen and rejected, [B] each, under the reference, to precompute them."""
        sums = self._reference_sums(_packed(inputs))
        return sums[0::2], sums[1::2]

    def _reference_sums(self, batch: PackedBatch) -> Tensor:
        """Return [2B] float32 on the policy's device, in the order c0, r0, c1, r1, ..."""
        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
        else:
            reference = self.accelerator.unwrap_model(self.model)
            if isinstance(reference, PeftModel):
                adapter = use_adapter(reference, adapter_name="ref" if "ref" in reference.peft_config else None)
        base = enable(reference)
        checkpoints = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpoints, adapter, self.accelerator.autocast():
            logps = base(packed=batch, reduce=response_logps)
        sums = sequence_sums(logps, batch.cu_rows, ld_alpha=self.args.ld_alpha)
        return sums.to(self.accelerator.device)

    def _note(self, mode: str, attention_mask: Tensor, out: _Output) -> None:
        """Keep the micro-batch's [B, 5] numbers on the device until the next log."""
        half = len(attention_mask) // 2
        tokens = attention_mask.sum(1, dtype=torch.float32)
        columns = [*(x.to(tokens.device) for x in out[1:]), tokens[:half] + tokens[half:]]
        self._kept[mode].append(self.accelerator.gather(torch.stack(columns, 1)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for values in self._kept[mode]:
            chosen_logps, rejected_logps, chosen, rejected, num_tokens = values.cpu().double().unbind(1)
            if mode == "train":
                self._total_train_tokens += int(num_tokens.sum().item())
            metrics = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).double(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": chosen_logps,
                "logps/rejected": rejected_logps,
            }
            for name, value in metrics.items():
                self._metrics[mode][name].append(value.mean().item())
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._kept[mode].clear()
        super().log(logs, start_time)


@dataclasses.dataclass(frozen=True, slots=True)
class _Packing:
    """Wraps the trainer's collator to add the packed row to a batch, on the CPU, in the loader's workers."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collate(examples))
        batch["packed"] = _packed(batch)
        return batch


def _packed(inputs: dict[str, Any]) -> PackedBatch:
    if "packed" in inputs:
        batch: PackedBatch = inputs["packed"]
        return batch
    odd = sorted(set(inputs) - _COLUMNS)
    if odd:
        raise ConfigError(f"{_NAME}: the collator gives {', '.join(odd)}", "give only " + ", ".join(sorted(_COLUMNS)))
    return pack_in_order(padded_groups(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]))


def _loss_function(args: DPOConfig, ref_sums: Tensor) -> Callable[[Tensor, Head, PackedBatch], _Output]:
    """Return a function: rows [N, H], head, batch -> the config's loss and what is logged."""
    names, weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
    smoothing = {name: args.label_smoothing if name in _SMOOTHED else 0.0 for name in names}

    def one(rows: Tensor, head: Head, batch: PackedBatch) -> _Output:
        refs = ref_sums.to(rows.device)
        with no_autocast(rows):
            out = pair_loss(
                rows,
                head,
                batch,
                refs,
                loss=names[0],
                beta=args.beta,
                label_smoothing=smoothing[names[0]],
                ld_alpha=args.ld_alpha,
            )
        chosen, rejected = out.chosen_logps, out.rejected_logps
        if args.ld_alpha is not None:  # TRL logs the weighted sums
            chosen = out.chosen_rewards / args.beta + refs[0::2]
            rejected = out.rejected_rewards / args.beta + refs[1::2]
        return _Output(out.loss * weights[0], chosen, rejected, out.chosen_rewards, out.rejected_rewards)

    def several(rows: Tensor, head: Head, batch: PackedBatch) -> _Output:
        logps = response_logps(rows, head, batch)
        sums = sequence_sums(logps, batch.cu_rows, ld_alpha=args.ld_alpha)
        ratios = sums - ref_sums.to(sums.device)
        tokens = batch.cu_rows.diff().to(sums)
        scores = PairScores(ratios[0::2], ratios[1::2], tokens[0::2], tokens[1::2])
        loss = sums.new_zeros(())
        for name, weight in zip(names, weights, strict=True):
            if name == _SFT:
                part = -sequence_sums(logps, batch.cu_rows)[0::2].sum() / tokens[0::2].sum()
            else:
                settings = LossSettings(name, args.beta, smoothing[name])
                part = LOSSES[name](scores, settings)[0].mean()
            loss = loss + weight * part
        kept, rewards = sums.detach(), args.beta * ratios.detach()
        return _Output(loss, kept[0::2], kept[1::2], rewards[0::2], rewards[1::2])

    # pair_loss forms the head's gradient in its forward; what it does not combine is left to autograd.
    fused = len(names) == 1 and names[0] != _SFT and (args.ld_alpha is None or names[0] in DESENSITISED)
    return one if fused else several


def _check_config(args: DPOConfig) -> None:
    ours = sorted([*_LOSSES, _SFT])
    unknown = [name for name in args.loss_type if name not in ours]
    smoothed = [name for name in args.loss_type if name in _SMOOTHED]
    refuse(
        _NAME,
        [
            *common_refusals(args),
            (bool(unknown), f"loss_type {', '.join(map(repr, unknown))}", f"use {', '.join(ours)}, or TRL's trainer"),
            (
                bool(args.label_smoothing) and not smoothed,
                f"label_smoothing={args.label_smoothing}: TRL ignores it for {', '.join(args.loss_type)}",
                "set it to 0, or use loss_type 'robust'",
            ),
            (
                not 0 <= args.label_smoothing < 0.5,
                f"label_smoothing={args.label_smoothing} has no meaning for 'robust'",
                "choose one in [0, 0.5)",
            ),
            (not args.beta > 0, f"beta={args.beta}", "choose a positive one"),
            (
                args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1,
                f"ld_alpha={args.ld_alpha}",
                "choose one in [0, 1]",
            ),
            (
                args.f_divergence_type != "reverse_kl",
                f"f_divergence_type={args.f_divergence_type!r}",
                "use 'reverse_kl'",
            ),
            (args.use_weighting, "use_weighting (WPO needs every logit)", "set it to False"),
            (args.padding_free, "padding_free: rows are always packed without padding here", "leave it False"),
            (args.activation_offloading, "activation_offloading: it has not been tested here", "set it to False"),
        ],
    )
    theirs = {field.name for kind in (TrainingArguments, _BaseConfig) for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(DPOConfig):
        if field.name in theirs or field.name in _KNOWN:
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if getattr(args, field.name) != default:
            raise ConfigError(f"{_NAME}: {field.name} is newer than this drop-in", "leave it at its default")
