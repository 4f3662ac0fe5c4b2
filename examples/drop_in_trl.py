"""TRL's DPO trainer with the fused loss: one line of a TRL script changes, the import.

python examples/drop_in_trl.py    # needs trl; on the pairs of the small demo, which is run where it is not done
"""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

import macpo
from macpo.integrations.trl import FusedDPOTrainer as DPOTrainer


def main() -> None:
    run = macpo.run(Path(__file__).with_name("small-demo.yaml"))
    (folder,) = run.folder.glob("*-init-student-positive/policy")  # the student before the first iteration
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))

    pairs = run.pairs()
    pairs = pairs[pairs.agent == "student"]
    rows = [
        {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        for prompt, chosen, rejected in zip(pairs.messages, pairs.chosen, pairs.rejected, strict=True)
    ]
    args = DPOConfig(
        str(run.folder.with_name("trl")),
        max_steps=6,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
    )
    trainer = DPOTrainer(
        model,
        reference,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    print(f"reward margin: {margins[0]:.4f} at the first step, {margins[-1]:.4f} at the last")


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


if __name__ == "__main__":
    main()
