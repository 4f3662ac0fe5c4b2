"""PreferenceTrainer beside plain loops, and every code block of docs/drop-in.md."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import model_of
from pages import named_blocks
from pair_models import id_rows, llama, logged, text_pairs, tokenizer
from transformers import LlamaForCausalLM, TrainingArguments

from macpo.engine.errors import ConfigError, DataError
from macpo.integrations.transformers import PairCollator, PreferenceTrainer, with_reference_logps
from macpo.integrations.trl import FusedDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**settings | changes)


def dpo_step(model: LlamaForCausalLM, rows: list[dict[str, Any]], rate: float) -> float:
    """One step of plain SGD on the mean DPO loss, written with every logit and without packing."""
    total = 0.0
    for row in rows:
        ratios = []
        for part in ("chosen", "rejected"):
            prompt, response = row["prompt_ids"], row[f"{part}_ids"]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(logits, -1)[range(len(response)), response].sum()
            ratios.append(logp - row[f"ref_{part}_logps"])
        total = total - F.logsigmoid(0.1 * (ratios[0] - ratios[1])) / len(rows)
    model.zero_grad()
    total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    return total.item()


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (3, 3)])
def test_the_split_of_a_step_does_not_change_it(tmp_path, size, accumulation, changes):
    """8 pairs a step as 8, 4 + 4 and 3 + 3 + 2, against a loop; the last split is where a mean of means is wrong."""
    rows = with_reference_logps(llama(1), id_rows(8))
    model, expected = llama(0), llama(0)
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    args = arguments(tmp_path, num_train_epochs=3, **split, **changes)
    ours = PreferenceTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    ours.train()
    losses = [dpo_step(expected, rows, 0.05) for _ in range(3)]
    assert logged(ours.state.log_history, "loss") == pytest.approx(losses, abs=2e-5)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    metrics = ours.evaluate()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(dpo_step_loss(expected, rows), abs=2e-5)
    trained = with_reference_logps(model, rows)
    gaps = [[row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in each] for each in (trained, rows)]
    margins = [0.1 * (new - old) for new, old in zip(*gaps, strict=True)]
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 8, abs=1e-4)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 8)


def dpo_step_loss(model: LlamaForCausalLM, rows: list[dict[str, Any]]) -> float:
    with torch.enable_grad():
        return dpo_step(copy.deepcopy(model), rows, 0.0)


def test_two_ranks_train_as_one_process_does(tmp_path):
    """DDP, two micro-batches of 2 a rank: FusedDPOTrainer logs what TRL logs; PreferenceTrainer steps as the loop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "helpers" / "pair_ranks.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("loss", "eval_loss", "rewards/margins", "rewards/accuracies", "logps/rejected", "num_tokens"):
        expected, got = (logged(found[kind], name) for kind in ("DPOTrainer", "FusedDPOTrainer"))
        assert len(got) >= 1 and got == pytest.approx(expected, rel=1e-4, abs=1e-4), name

    rows, expected = with_reference_logps(llama(1), id_rows(16)), llama(0)
    losses = [dpo_step(expected, part, 0.02) for part in (rows[:8], rows[8:], rows[:8])]
    assert logged(found["PreferenceTrainer"], "loss") == pytest.approx(losses, abs=2e-5)
    for values, parameter in zip(found["weights"], expected.parameters(), strict=True):
        assert values == pytest.approx(parameter.detach().flatten().tolist(), abs=2e-5)


def test_what_the_preference_trainer_refuses(tmp_path):
    rows = id_rows(4)
    for change, message in (
        ({"loss": "exo"}, "unknown loss 'exo'"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "loss 'hinge' has no label_smoothing"),
        ({"sft_weight": -0.1}, "sft_weight must not be negative"),
        ({"loss": "simpo"}, "loss 'simpo' needs gamma"),
        ({"compute_metrics": print}, "compute_metrics"),
        ({"compute_loss_func": print}, "compute_loss_func"),
        ({"args": arguments(tmp_path, neftune_noise_alpha=1.0)}, "neftune_noise_alpha"),
        ({"args": arguments(tmp_path, label_smoothing_factor=0.1)}, "label_smoothing_factor"),
    ):
        with pytest.raises(ConfigError, match=f"PreferenceTrainer: {re.escape(message)}"):
            PreferenceTrainer(llama(0), **{"args": arguments(tmp_path), "train_dataset": rows} | change)
    for changes, message in (
        ({"output_router_logits": True}, "the router's auxiliary loss"),
        ({"router_jitter_noise": 0.1}, ".* routes with noise in training"),
    ):
        mixture = model_of("mixtral", num_key_value_heads=2, num_local_experts=2, **changes)
        with pytest.raises(ConfigError, match=f"PreferenceTrainer: {message}"):
            PreferenceTrainer(mixture, arguments(tmp_path), train_dataset=rows)
    with pytest.raises(DataError, match="the rows lack ref_chosen_logps"):
        PreferenceTrainer(llama(0), arguments(tmp_path), train_dataset=rows).train()
    scored = with_reference_logps(llama(0), rows)
    with pytest.raises(DataError, match="but the loss is reference-free"):
        PreferenceTrainer(llama(0), arguments(tmp_path), train_dataset=scored, reference_free=True).train()
    with pytest.raises(DataError, match="pair 1 of the batch lacks"):
        PairCollator()([scored[0], rows[1]])
    with pytest.raises(DataError, match="lacks rejected_ids"):
        PairCollator()([{"prompt_ids": [1], "chosen_ids": [2]}])


# --- docs/drop-in.md ---------------------------------------------------------------------------------------------

BLOCKS = named_blocks("docs/drop-in.md")


def padded_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """c0, r0, c1, r1, ... padded on the right."""
    pairs = [(row["prompt_ids"], row[f"{part}_ids"]) for row in rows for part in ("chosen", "rejected")]
    length = max(len(p) + len(r) for p, r in pairs)
    triples = [(p, r, [0] * (length - len(p) - len(r))) for p, r in pairs]
    return {
        "input_ids": torch.tensor([p + r + pad for p, r, pad in triples]),
        "attention_mask": torch.tensor([[1] * (length - len(pad)) + pad for _, _, pad in triples]),
        "response_mask": torch.tensor([[0] * len(p) + [1] * len(r) + pad for p, r, pad in triples]).bool(),
    }


def test_every_block_of_the_page_is_run_here():
    assert list(BLOCKS) == ["trl", "trainer", "hand-written-loop", "scoring", "llama-factory"]
    assert len([line for line in BLOCKS["hand-written-loop"].splitlines() if line.strip()]) <= 15


def test_docs_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"model": llama(0), "reference": llama(1), "pairs": text_pairs(16), "tokenizer": tokenizer()}
    exec(BLOCKS["trl"], space)
    assert isinstance(space["trainer"], FusedDPOTrainer) and space["trainer"].state.global_step == 2


def test_docs_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"model": llama(0), "rows": id_rows(16)}
    exec(BLOCKS["trainer"], space)
    assert space["trainer"].state.global_step == 2
    assert set(space["rows"][0]) >= {"ref_chosen_logps", "ref_rejected_logps"}


def test_docs_hand_written_loop():
    rows = with_reference_logps(llama(1), id_rows(8))
    model, expected = llama(0), llama(0)
    space = {
        "model": model,
        "reference": llama(1),
        "batches": [padded_batch(rows[:5]), padded_batch(rows[5:])],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
    }
    exec(BLOCKS["hand-written-loop"], space)
    for part in (rows[:5], rows[5:]):
        dpo_step(expected, part, 0.05)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_docs_scoring():
    rows, model = id_rows(5), llama(0)
    space: dict[str, Any] = {"model": model, "batch": padded_batch(rows)}
    exec(BLOCKS["scoring"], space)
    scored = with_reference_logps(model, rows)
    parts = [(row[f"ref_{part}_logps"], len(row[f"{part}_ids"])) for row in scored for part in ("chosen", "rejected")]
    expected = [math.exp(-logp / length) for logp, length in parts]
    assert space["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_docs_llama_factory_method(loss):
    """The method on its own: log-probs and gradients of log_softmax over all positions, and the head put back."""
    space: dict[str, Any] = {}
    exec(BLOCKS["llama-factory"], space)
    model, rows = llama(0), id_rows(4)
    batch = padded_batch(rows)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    labels = batch["input_ids"].masked_fill(~batch["response_mask"], -100)[order]
    inputs = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    self = SimpleNamespace(ld_alpha=None, loss_type=loss, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    grads = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            out = space["concatenated_forward"](self, model, {**inputs, "labels": labels})
            chosen, rejected, means = (out[n] for n in ("chosen_logps", "rejected_logps", "chosen_logps_avg"))
        else:
            logps = torch.log_softmax(model(**inputs).logits[:, :-1], -1)
            logps = logps.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * (labels[:, 1:] != -100)
            sums, lengths = logps.sum(1), (labels != -100).sum(1)
            expected_chosen, expected_rejected = (sums / lengths if loss == "ipo" else sums).chunk(2)
            assert torch.allclose(chosen, expected_chosen, atol=1e-4)
            assert torch.allclose(rejected, expected_rejected, atol=1e-4)
            assert torch.allclose(means, (sums / lengths)[:4], atol=1e-4)
            chosen, rejected = expected_chosen, expected_rejected
        (chosen.sum() - 0.5 * rejected.sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    with pytest.raises(ValueError, match="ld_alpha"):
        space["concatenated_forward"](SimpleNamespace(ld_alpha=0.5), model, {})
