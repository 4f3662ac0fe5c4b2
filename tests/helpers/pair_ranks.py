"""Two ranks (torchrun's environment) train with the drop-ins and with TRL: pair_ranks.py OUT writes what was logged."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from pair_models import id_rows, llama, text_pairs, tokenizer
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from macpo.integrations.transformers import PreferenceTrainer, with_reference_logps
from macpo.integrations.trl import FusedDPOTrainer


def main() -> None:
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
    gc.collect()  # models wrapped for DDP that outlive their process group can hang
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(out: Path) -> None:
    common = {
        "output_dir": str(out), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "learning_rate": 0.02, "max_steps": 3, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "max_grad_norm": 0.0,
    }  # fmt: skip
    found = {}
    for kind in (DPOTrainer, FusedDPOTrainer):
        args = DPOConfig(**common, bf16=False)
        trainer = kind(
            llama(0), llama(1), args, train_dataset=text_pairs(24), eval_dataset=text_pairs(6, 1),
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        found[kind.__name__] = [*trainer.state.log_history, trainer.evaluate()]
    rows = with_reference_logps(llama(1), id_rows(16))
    sequential = {"optim": "sgd", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    preference = PreferenceTrainer(llama(0), TrainingArguments(**common, **sequential), train_dataset=rows)
    preference.train()
    found["PreferenceTrainer"] = preference.state.log_history
    if preference.is_world_process_zero():
        found["weights"] = [p.detach().flatten().tolist() for p in preference.model.parameters()]
        (out / "found.json").write_text(json.dumps(found))


main()
