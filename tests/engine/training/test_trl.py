"""The engine beside TRL's own DPOTrainer: the same pairs in the same order give the same loss, step by step."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from pair_models import llama, logged, text_pairs, tokenizer
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from macpo.engine.config import PreferenceSettings
from macpo.engine.data.batches import BatchOrder
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.models.policy import PolicyModule
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference
from macpo.engine.training.reference import reference_logps
from macpo.engine.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")

NUM_PAIRS, BATCH, STEPS, SEED = 40, 8, 20, 3
TOLERANCE = 1e-4  # of a loss in float32
SETTINGS = PreferenceSettings(
    learning_rate=4e-3,
    epochs=STEPS * BATCH // NUM_PAIRS,
    batch=BATCH,
    schedule="linear",  # transformers' warm-up starts at a rate of 0, ours above it, so there is none here
    weight_decay=0.1,
    max_grad_norm=3.0,
    beta=0.3,
    sft_weight=0.0,
)


class Recorded(DPOTrainer):
    """TRL's trainer, untouched, and the loss of every micro-batch before it is rounded for the log."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        out = super().compute_loss(*args, **kwargs)
        self.losses.append((out[0] if isinstance(out, tuple) else out).item())
        return out


def model(tuning: str) -> Any:
    base = llama(0)
    if tuning == "full":
        return base
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))


def by_trl(start: Any, tuning: str, accumulation: int, rows: datasets.Dataset, folder: Path) -> Recorded:
    """Twenty steps of TRL over `rows` as they come."""
    args = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation, max_steps=STEPS, train_sampling_strategy="sequential",
        learning_rate=SETTINGS.learning_rate, lr_scheduler_type="linear", weight_decay=SETTINGS.weight_decay,
        max_grad_norm=SETTINGS.max_grad_norm, beta=SETTINGS.beta, max_length=None, logging_steps=1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    # Without an adapter to turn off, TRL wants a second model (or a folder to load it from).
    ref = copy.deepcopy(start) if tuning == "full" else None
    trainer = Recorded(start, ref_model=ref, args=args, train_dataset=rows, processing_class=tokenizer())
    trainer.losses = []
    trainer.train()
    return trainer


def groups_of(rows: datasets.Dataset) -> list[PrefixGroup]:
    """The token ids that TRL made of the pairs."""
    return [PrefixGroup(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]


def by_us(start: Any, groups: list[PrefixGroup], folder: Path) -> list[dict[str, float]]:
    policy = PolicyModule(start)
    ref = reference_logps(score(policy, groups))
    train(policy, groups, preference(SETTINGS, ref), SETTINGS, seed=SEED, workdir=folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_twenty_steps_have_the_losses_of_trl(tmp_path: Path, tuning: str, accumulation: int) -> None:
    """Four epochs of 40 pairs, 8 a step; TRL pads, holds a second model or turns the adapter off, and checkpoints."""
    start = model(tuning)
    pairs = text_pairs(NUM_PAIRS)
    plan = BatchOrder(NUM_PAIRS, BATCH, SETTINGS.epochs, SEED)
    order = [i for _, indices in plan.steps() for i in indices]
    theirs = by_trl(copy.deepcopy(start), tuning, accumulation, pairs.select(order), tmp_path / "trl")
    of_pair = dict(zip(order, groups_of(theirs.train_dataset), strict=True))
    rows = by_us(start, [of_pair[i] for i in range(NUM_PAIRS)], tmp_path / "ours")

    micro = theirs.losses
    expected = [sum(micro[k : k + accumulation]) / accumulation for k in range(0, len(micro), accumulation)]
    losses = [row["loss"] for row in rows]
    assert len(losses) == len(expected) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < TOLERANCE
    # twenty steps that would show an error: the loss moves, and gradients were cut in some steps and not in others
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.2
    assert {row["grad_norm"] > SETTINGS.max_grad_norm for row in rows} == {True, False}

    history = theirs.state.log_history
    for name, ours, scale in (
        ("grad_norm", [row["grad_norm"] for row in rows], 1.0),
        ("learning_rate", [row["lr"] for row in rows], 1.0),
        ("rewards/chosen", [row["chosen_rewards"] for row in rows], 1.0),
        ("rewards/rejected", [row["rejected_rewards"] for row in rows], 1.0),
        ("rewards/margins", [row["margin"] for row in rows], 1.0),
        ("logps/chosen", [row["chosen_logps"] for row in rows], 100.0),  # sums of tens of nats
    ):
        logs = logged(history, name)
        assert len(logs) == STEPS
        assert max(abs(a - b) for a, b in zip(ours, logs, strict=True)) < 5 * TOLERANCE * scale, name
