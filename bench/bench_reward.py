"""A reward model trained beside TRL's RewardTrainer on the same tokens: held-out accuracy with interval, steps, time.

    python -m bench.bench_reward --model FOLDER --data hh=FILE_OR_FOLDER --data pku=FILE [--pairs 2000] [--test 1000]
        [--tuning lora|full] [--batch 32] [--learning-rate 1e-4] [--epochs 1] [--max-length 512] [--json FILE]

Both start from the same weights (a score head of zeros, the same adapter) and see the same batches in the same order
at the same constant learning rate. TRL runs without gradient checkpointing, in float32 as we do, with the micro-batch
(2, 4, 8 pairs or the whole batch) that takes a first step the fastest. Its padding token is one that ends no response,
so both read the reward at a response's end token. The time is that of all steps; loading, tokenising and scoring are
left out. Both models are then scored by the same plain transformers forward.

A set's test prompts are in none of its training pairs; one pair of each prompt is used.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

from bench.harness.device import provenance
from macpo.data.preferences import load_preferences
from macpo.data.prompts import Prompts
from macpo.engine.config import FullSettings, LoraSettings, OptimSettings, Tuning
from macpo.engine.data.batches import BatchOrder
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.reward.classifier import Classifier, load_classifier
from macpo.engine.models.reward.saving import padding_id, save_reward
from macpo.engine.models.reward.score_head import RewardModule
from macpo.engine.training.objectives import bradley_terry
from macpo.engine.training.trainer import train
from macpo.evaluation.agreement import agreement

CENTRING = 0.01
SCORE_TOKENS = 16384


@dataclass(frozen=True)
class Options:
    """What both trainers get."""

    model: str
    tuning: Tuning
    optim: OptimSettings
    pairs: int
    test: int
    max_length: int
    seed: int

    @property
    def is_lora(self) -> bool:
        return isinstance(self.tuning, LoraSettings)


@dataclass(frozen=True)
class Outcome:
    """One trainer on one data set."""

    data: str
    trainer: str
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    micro_batch: int | None
    """Pairs of a forward of TRL's; None for packed tokens."""
    agreement: dict[str, Any]


def read(path: Path, chat: Chat, options: Options) -> tuple[list[PrefixGroup], list[PrefixGroup]]:
    """Training and test pairs as tokens, one of each prompt; longer than `max_length` or equal as tokens are left out.

    The training pairs are whole batches.
    """
    pairs, _ = load_preferences(path)
    prompts = Prompts(pairs, options.seed)
    found: list[PrefixGroup] = []
    for pair in prompts.first(0, len(prompts)):
        responses = [(pair.reply(side), True) for side in ("chosen", "rejected")]
        group = chat.group(pair.prompt.messages, responses, max_tokens=1 << 20, max_prompt_tokens=1 << 19)
        if group is not None and group.max_length <= options.max_length and group.responses[0] != group.responses[1]:
            found.append(group)
        if len(found) == options.test + options.pairs:
            break
    test, rest = found[: options.test], found[options.test :]
    return rest[: len(rest) // options.optim.batch * options.optim.batch], test


def ours(name: str, groups: list[PrefixGroup], test: list[PrefixGroup], chat: Chat, options: Options) -> Outcome:
    """Train by macpo."""
    ref = PolicyRef(options.model)
    module = RewardModule(ModelCache().policy(ref, options.tuning, seed=options.seed))
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        start = time.perf_counter()
        train(module, groups, bradley_terry(CENTRING), options.optim, seed=options.seed, workdir=work, progress=name)
        seconds = time.perf_counter() - start
        losses = [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
        save_reward(module, work / "policy", start=ref, tuning=options.tuning, chat=chat)
        found = judged(load_classifier(work / "policy"), test)
    return Outcome(name, "macpo", len(losses), seconds, losses[0], losses[-1], None, found)


def theirs(name: str, groups: list[PrefixGroup], test: list[PrefixGroup], chat: Chat, options: Options) -> Outcome:
    """Train by TRL, from the same weights, in the same order."""
    batch = options.optim.batch
    order = BatchOrder(len(groups), batch, options.optim.epochs, options.seed)
    rows = [_row(groups[i]) for _, indices in order.steps() for i in indices]
    sizes = [size for size in sorted({2, 4, 8, batch}) if batch % size == 0]
    tried = {size: _trl(rows[:batch], chat, options, size).step_seconds[-1] for size in sizes}
    print(f"TRL, seconds of a step by pairs a forward: {tried}", flush=True)
    micro_batch = min(sizes, key=tried.__getitem__)
    done = _trl(rows, chat, options, micro_batch)
    trained = done.model.merge_and_unload() if options.is_lora else done.model
    found = judged(Classifier(trained.eval(), 0), test)
    losses, seconds = done.losses, sum(done.step_seconds)
    return Outcome(name, "TRL RewardTrainer", len(losses), seconds, losses[0], losses[-1], micro_batch, found)


@dataclass(frozen=True)
class TrlRun:
    """What TRL made of some batches."""

    model: Any
    losses: list[float]
    step_seconds: list[float]


class StepTimes(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **more: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def _trl(rows: list[dict[str, list[int]]], chat: Chat, options: Options, micro_batch: int) -> TrlRun:
    """TRL's trainer over `rows`, in their order, `micro_batch` pairs a forward."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(model.score.weight)
    tokenizer = chat.hf_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(chat))
    model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(options.tuning, LoraSettings):
        model = with_adapter(model, options)
    optim = options.optim
    times = StepTimes()
    with tempfile.TemporaryDirectory() as made:
        config = RewardConfig(
            made,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=optim.batch // micro_batch,
            num_train_epochs=1,  # the epochs' own orders lie one after the other
            learning_rate=optim.learning_rate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            max_grad_norm=optim.max_grad_norm,
            center_rewards_coefficient=CENTRING,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = Dataset.from_list(rows)
        trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[times])
        trainer.train()
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return TrlRun(model, losses, times.seconds)


def with_adapter(model: Any, options: Options) -> Any:
    """TRL's model with peft's adapter, whose numbers are those of ours."""
    assert isinstance(options.tuning, LoraSettings)
    ours = ModelCache().policy(PolicyRef(options.model), options.tuning, seed=options.seed)
    numbers = dict(ours.model.named_parameters())
    targets = options.tuning.target_modules
    config = LoraConfig(
        r=options.tuning.rank,
        lora_alpha=options.tuning.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.SEQ_CLS,
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(numbers[name])
    return wrapped


def _row(group: PrefixGroup) -> dict[str, list[int]]:
    chosen, rejected = (group.prompt_ids + response for response in group.responses)
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def judged(classifier: Classifier, test: Sequence[PrefixGroup]) -> dict[str, Any]:
    """How well a model agrees with the held-out pairs."""
    rows = [group.prompt_ids + response for group in test for response in group.responses]
    scores = [float(score or 0.0) for score in classifier.scores(rows, batch_tokens=SCORE_TOKENS)]
    lengths = [[len(group.responses[side]) for group in test] for side in (0, 1)]
    return agreement(scores[::2], scores[1::2], *lengths)


def shown(outcomes: Sequence[Outcome]) -> str:
    """The table of all outcomes."""
    lines = [
        f"{'data':8} {'trainer':18} {'accuracy':>8}  {'95% interval':15} {'steps':>5} {'s':>8}  losses: first, last"
    ]
    for each in outcomes:
        found = each.agreement
        interval = f"[{found['reward_accuracy_low']:.3f}, {found['reward_accuracy_high']:.3f}]"
        lines.append(
            f"{each.data:8} {each.trainer:18} {found['reward_accuracy']:8.3f}  {interval:15} {each.steps:5} "
            f"{each.seconds:8.1f}  {each.first_loss:.4f} {each.last_loss:.4f}  ({found['reward_pairs']} test pairs)"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal LM with its tokenizer")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=PATH", help="a preference set")
    parser.add_argument("--pairs", type=int, default=2000, help="training pairs of each set")
    parser.add_argument("--test", type=int, default=1000, help="test pairs of each set")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, on all linear layers")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=512, help="longer pairs are left out")
    parser.add_argument("--microbatch-tokens", type=int, default=8192, help="of a packed forward of ours")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    said = parse(argv)
    lora = LoraSettings(rank=said.rank, alpha=2.0 * said.rank, target_modules="all-linear")
    optim = OptimSettings(
        learning_rate=said.learning_rate,
        epochs=said.epochs,
        batch=said.batch,
        schedule="constant",
        microbatch_tokens=said.microbatch_tokens,
        save_every_steps=1_000_000,  # no checkpoint is timed but the last
    )
    tuning: Tuning = lora if said.tuning == "lora" else FullSettings()
    options = Options(said.model, tuning, optim, said.pairs, said.test, said.max_length, said.seed)
    chat = Chat(load_tokenizer(said.model), said.template)
    outcomes: list[Outcome] = []
    for each in said.data:
        name, _, path = each.partition("=")
        groups, test = read(Path(path), chat, options)
        print(f"{name}: {len(groups)} training pairs, {len(test)} test pairs", flush=True)
        for run in (ours, theirs):
            outcomes.append(run(name, groups, test, chat, options))
            print(shown(outcomes[-1:]), flush=True)
    print(shown(outcomes))
    if said.json is not None:
        body = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        names = {"model": Path(said.model).name, "data": [each.partition("=")[0] for each in said.data], "json": None}
        options = {name: str(value) for name, value in {**vars(said), **names}.items() if value is not None}
        body |= {"options": options, "results": [asdict(each) for each in outcomes]}
        said.json.write_text(json.dumps(body, indent=1) + "\n")
    return outcomes


if __name__ == "__main__":
    main()
