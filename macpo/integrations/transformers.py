"""Preference training with Hugging Face's own Trainer: rows of ids in, `pair_loss` over packed shared prompts.

    from macpo.integrations.transformers import PreferenceTrainer, with_reference_logps
    rows = with_reference_logps(model, rows)  # {"prompt_ids", "chosen_ids", "rejected_ids"}: lists of token ids
    PreferenceTrainer(model, TrainingArguments(...), train_dataset=rows, beta=0.1).train()

A subclass, not `compute_loss_func`: transformers calls that one with the model's outputs, which by then hold every
logit, and counts items by `labels`, which pairs do not have.

B pairs of a micro-batch, N response tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.head import Head, pair_loss
from macpo.engine.models.support import router_loss_coefficient
from macpo.engine.scoring import score
from macpo.integrations.packed import (
    base_of,
    check_held,
    check_model,
    common_refusals,
    enable,
    no_autocast,
    pack_in_order,
    refuse,
)
from macpo.kernels.pair_loss.losses import REFERENCE_FREE, LossSettings, check_loss
from macpo.kernels.pair_loss.result import PairLoss

__all__ = ["PairCollator", "PreferenceTrainer", "with_reference_logps"]

_NAME = "PreferenceTrainer"
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REFS = ("ref_chosen_logps", "ref_rejected_logps")
_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")


class PairCollator:
    """Collates rows into one packed row whose pairs share their prompts; nothing is padded or cut.

    A row holds `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of token ids) and, for a loss with a reference,
    `ref_chosen_logps` and `ref_rejected_logps` (summed log-probs); see `with_reference_logps`.

    Raises:
        DataError: an empty prompt or response; log-probs in some rows only.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups = [_group(row) for row in rows]
        for index, group in enumerate(groups):
            group.check(f"pair {index} of the batch")
        packed = pack_in_order(groups)
        batch: dict[str, Any] = {
            "num_tokens": torch.tensor([group.num_tokens for group in groups]),  # first: its length is the batch's
            "input_ids": packed.input_ids,
            "packed": packed,
        }
        given = {name for row in rows for name in _REFS if row.get(name) is not None}
        if given:
            missing = [index for index, row in enumerate(rows) if any(row.get(name) is None for name in _REFS)]
            if missing:
                raise DataError(
                    f"pair {missing[0]} of the batch lacks {' or '.join(_REFS)}", "score all rows with one reference"
                )
            for name in _REFS:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def with_reference_logps(
    model: PreTrainedModel | PeftModel, rows: Sequence[Mapping[str, Any]], *, max_tokens: int = 16384
) -> list[dict[str, Any]]:
    """Add `ref_chosen_logps` and `ref_rejected_logps` to rows: summed log-probs under `model` as it is now.

    Args:
        model: the reference; mostly the policy before training. It may be a peft model: its active adapter counts.
        rows: with `prompt_ids`, `chosen_ids`, `rejected_ids`.
        max_tokens: token budget of one packed forward.

    Raises:
        ConfigError: an architecture that cannot be packed. DataError: an empty prompt or response.
    """
    was_training = model.training
    scores = score(model, [_group(row) for row in rows], max_tokens=max_tokens)
    model.train(was_training)
    return [
        {**row, **dict(zip(_REFS, (part.sum_logp for part in pair), strict=True))}
        for row, pair in zip(rows, scores, strict=True)
    ]


class PreferenceTrainer(Trainer):
    """transformers' `Trainer` for preference pairs.

    The loss is the mean over all pairs of an optimiser step: `gradient_accumulation_steps` and DDP only split that
    sum. Logged beside the loss: rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
    logps/rejected, means over the pairs since the last log.

    Args:
        model: a causal LM, or peft's wrapper around one.
        args: TrainingArguments; gradient checkpointing and mixed precision are honoured.
        loss, beta, label_smoothing, gamma, sft_weight: as in `macpo.kernels.pair_loss`.
        reference_free: the rows hold no reference log-probs and shall not; always so for "simpo" and "orpo".
        kwargs: Trainer's; the default collator is `PairCollator()`.

    Raises:
        ConfigError: at construction, one line naming a setting that is not honoured.
        DataError: rows without reference log-probs, unless `reference_free`.
    """

    loss_is_scaled_for_ga = True
    model: Any  # PreTrainedModel or PeftModel
    args: Any  # TrainingArguments, its settings resolved
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        sft_weight: float | None = None,
        reference_free: bool = False,
        **kwargs: Any,
    ) -> None:
        if sft_weight is None:
            sft_weight = 1.0 if loss == "orpo" else 0.0
        reference_free = reference_free or loss in REFERENCE_FREE
        try:
            check_loss(LossSettings(loss, beta, label_smoothing, gamma, None, sft_weight), not reference_free)
        except ValueError as error:
            raise ConfigError(f"{_NAME}: {error}") from error
        refuse(
            _NAME,
            [
                (kwargs.get("compute_loss_func") is not None, "compute_loss_func: the loss is pair_loss", "omit it"),
                (kwargs.get("compute_metrics") is not None, "compute_metrics needs every logit", "omit it"),
            ],
        )
        kwargs.setdefault("data_collator", PairCollator())
        super().__init__(model, args, **kwargs)
        refuse(
            _NAME,
            [
                *common_refusals(self.args),
                (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed or FSDP is on", "use DDP"),
                (self.args.n_gpu > 1, "several GPUs in one process", "launch with torchrun or accelerate"),
                (self.args.label_smoothing_factor != 0, "label_smoothing_factor", "use label_smoothing"),
                (
                    bool(self.args.accelerator_config.dispatch_batches),
                    "dispatch_batches: packed rows are not tensors",
                    "leave it off",
                ),
                (
                    router_loss_coefficient(base_of(model).config) > 0,
                    "the router's auxiliary loss of a mixture of experts",
                    "set output_router_logits=False in the model's config, or use macpo's own trainer",
                ),
            ],
        )
        check_model(_NAME, model)
        enable(model)
        self.model_accepts_loss_kwargs = True  # before loss_is_scaled_for_ga existed, this said the same
        self._options: dict[str, Any] = {
            "loss": loss,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "gamma": gamma,
            "sft_weight": sft_weight,
        }
        self._reference_free = reference_free
        self._sums: dict[str, Tensor] = {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], int]:
        """Return an optimiser step's batches and number of pairs, over all processes where the loss is averaged so."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        num_pairs = sum(_num_pairs(batch["packed"]) for batch in samples)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = torch.tensor([num_pairs], device=self.accelerator.device)
            num_pairs = int(self.accelerator.reduce(count, "sum").item())
        return samples, num_pairs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with attention_hook(enable(self.model)):  # until the backward is over: checkpointed layers run again in it
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum of the pairs' losses / `num_items_in_batch` pairs; without it, their mean."""
        batch: PackedBatch = inputs["packed"]
        refs = self._reference(inputs)
        if model.training:
            check_held(enable(self.model))
        num_pairs = num_items_in_batch or _num_pairs(batch)

        def reduce(rows: Tensor, head: Head, batch: PackedBatch) -> PairLoss:
            with no_autocast(rows):
                return pair_loss(rows, head, batch, refs, num_pairs=num_pairs, **self._options)

        out: PairLoss = model(packed=batch, reduce=reduce)
        self._note("train" if model.training else "eval", out)
        loss = out.loss
        if num_items_in_batch and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss alone: there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else next((n[: -len("loss")] for n in logs if n.endswith("_loss")), "eval_")
        sums = self._sums.pop(mode, None)
        if sums is not None:
            *totals, num_pairs = self.accelerator.reduce(sums, "sum").tolist()
            means = {name: total / num_pairs for name, total in zip(_METRICS, totals, strict=True)}
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
            logs |= {prefix + name: value for name, value in means.items()}
        super().log(logs, *args, **kwargs)

    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return [2B] float32 in the order c0, r0, c1, r1, ..."""
        given = _REFS[0] in inputs
        if given == self._reference_free:
            raise DataError(
                "the rows have reference log-probs, but the loss is reference-free"
                if given
                else f"the rows lack {' and '.join(_REFS)}",
                "drop those columns" if given else "make them with with_reference_logps, or pass reference_free=True",
            )
        return torch.stack([inputs[name] for name in _REFS], 1).flatten() if given else None

    def _note(self, mode: str, out: PairLoss) -> None:
        """Add to the sums of the next log on the device, so that no step waits for it."""
        values = (
            out.chosen_rewards,
            out.rejected_rewards,
            (out.chosen_rewards > out.rejected_rewards).to(out.chosen_rewards),
            out.chosen_logps,
            out.rejected_logps,
            torch.ones_like(out.chosen_logps),
        )
        sums = torch.stack([value.sum() for value in values]).detach()
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums

    def _set_signature_columns_if_needed(self) -> None:  # Trainer drops every column that the model does not name
        self._signature_columns = [*_IDS, *_REFS]


def _group(row: Mapping[str, Any]) -> PrefixGroup:
    missing = [name for name in _IDS if name not in row]
    if missing:
        raise DataError(f"a row lacks {', '.join(missing)}", "give " + ", ".join(_IDS) + " as lists of token ids")
    prompt, chosen, rejected = (list(row[name]) for name in _IDS)
    return PrefixGroup(prompt, [chosen, rejected])


def _num_pairs(batch: PackedBatch) -> int:
    return (len(batch.cu_rows) - 1) // 2
