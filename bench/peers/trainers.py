"""Who takes part in the training benchmark: the engine, and TRL's DPOTrainer as it comes and at its best.

Each run makes its model anew from a seed, so all start alike and none leaves anything behind. Times are those of the
reference pass and of the loop over steps, with the data waiting as token ids; making models, tokenising and saving
are left out of everybody's.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig

from bench.harness import memory
from bench.harness.device import synchronise
from bench.harness.measure import Unavailable
from bench.inputs.pairs import PairData
from macpo.engine.config import LoraSettings, ParallelSettings, PreferenceSettings
from macpo.engine.data.batches import BatchOrder
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.world import World, finish
from macpo.engine.models.liger import use_liger
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference
from macpo.engine.training.reference import reference_logps
from macpo.engine.training.trainer import train

BETA, SEED, LEARNING_RATE = 0.1, 0, 1e-4
LORA = LoraSettings(rank=16, alpha=32.0, target_modules="all-linear")


@dataclass(frozen=True)
class Setup:
    """What the rivals of a case share."""

    config: PretrainedConfig
    tuning: Literal["full", "lora"]
    dtype: torch.dtype
    """Dtype of the products. Trained weights are float32 everywhere."""
    device: torch.device
    pairs_per_step: int
    data: PairData
    weights: str | None = None
    """Folder of a model with this configuration; None makes random weights."""


@dataclass(frozen=True)
class Work:
    """The pairs of one round, as indices of the data; everybody trains on all of them once."""

    shuffled: list[int]
    by_length: list[int]
    """The same pairs, ordered so that each step's have nearly one length."""

    def steps(self, pairs_per_step: int) -> int:
        return len(self.shuffled) // pairs_per_step


@dataclass
class Outcome:
    """What one run took and found."""

    reference_s: float = 0.0
    """Time of the reference pass where it is a separate pass; else it is part of `steps_s`."""
    steps_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Loss of each step."""
    ref_logps: Tensor | None = None
    """[pairs, 2] float32, in the order of the given pairs; None without a separate reference pass."""
    peak_bytes: int | None = None
    """CUDA only: most memory allocated from the reference pass to the last step, weights included."""

    @property
    def seconds(self) -> float:
        return self.reference_s + self.steps_s


@dataclass(frozen=True)
class Rival:
    """One way to train."""

    name: str
    trl: dict[str, Any] | None = None
    """Settings of TRL's DPOConfig beyond its defaults; None is the engine."""
    by_length: bool = False
    half_base: bool = False
    """Whether a frozen base is loaded in the 16-bit dtype; TRL's default loads float32."""
    micro: int | None = None
    """Pairs of a forward, whose gradients are accumulated to a step; None takes the step whole."""

    def order(self, work: Work) -> list[int]:
        return work.by_length if self.by_length else work.shuffled

    def run(self, setup: Setup, work: Work) -> Outcome:
        """Train a fresh model on the round's pairs. Raises Unavailable where it cannot be."""
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory(prefix="macpo-bench-") as folder:
            if self.trl is not None:
                return _trl(self, setup, work, Path(folder))
            try:
                return _engine(setup, work, Path(folder))
            finally:
                gc.collect()
                finish()  # float32 weights that compute in bfloat16 are held by FSDP2, in a process group of one


OURS = Rival("macpo engine", half_base=True)
DEFAULTS = Rival("TRL DPOTrainer, defaults", {})
MICRO = (2, 4, 8)
"""Micro-batches among which TRL's best is sought: padding and memory traffic grow with them, launches fall."""


def best(micro: int) -> Rival:
    """TRL as its documentation would tune it, with so many pairs a forward."""
    return Rival(
        f"TRL DPOTrainer, best, {micro} pairs a forward",
        {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "precompute_ref_batch_size": micro},
        by_length=True,
        half_base=True,
        micro=micro,
    )


def best_for(pairs_per_step: int) -> tuple[Rival, ...]:
    """TRL at its best, once for each micro-batch that divides a step."""
    return tuple(best(micro) for micro in MICRO if pairs_per_step % micro == 0)


def model_of(setup: Setup, half_base: bool) -> Any:
    """Build the case's model, with an adapter where one is trained; the same weights every time."""
    torch.manual_seed(SEED)
    if setup.weights is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(setup.weights, dtype=torch.float32).to(setup.device)
    else:
        with setup.device:
            model = LlamaForCausalLM(setup.config)
    if setup.tuning == "full":
        return model
    if half_base:
        model = model.to(setup.dtype)
    return lora.new_adapter(model.requires_grad_(False), LORA, seed=SEED)


def _engine(setup: Setup, work: Work, folder: Path) -> Outcome:
    groups = _in_plan_order(setup, work)
    model = model_of(setup, half_base=True)
    use_liger(model.get_base_model() if isinstance(model, PeftModel) else model, ParallelSettings(), setup.device)
    policy = PolicyModule(model, compute_dtype=setup.dtype)
    parallelize(policy, ParallelSettings(), World())
    settings = PreferenceSettings(
        learning_rate=LEARNING_RATE, batch=setup.pairs_per_step, schedule="linear", beta=BETA, sft_weight=0.0
    )
    _reset_peak(setup.device)
    start = time.perf_counter()
    ref_logps = reference_logps(score(policy, groups))
    synchronise(setup.device)
    reference_s = time.perf_counter() - start
    train(policy, groups, preference(settings, ref_logps), settings, seed=SEED, workdir=folder)
    rows, timing = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "timing")
    )
    return Outcome(
        reference_s,
        sum(row["seconds"] for row in timing),
        [row["loss"] for row in rows],
        ref_logps[_plan(setup, work)],
        _peak(setup.device),
    )


def _plan(setup: Setup, work: Work) -> list[int]:
    return BatchOrder(len(work.shuffled), setup.pairs_per_step, 1, SEED).order(0)


def _in_plan_order(setup: Setup, work: Work) -> list[PrefixGroup]:
    """Order groups so that the engine's shuffling gives the order of `work.shuffled`: steps are the same."""
    places: dict[int, int] = dict(zip(_plan(setup, work), work.shuffled, strict=True))
    return [setup.data.groups[places[i]] for i in range(len(places))]


def _trl(rival: Rival, setup: Setup, work: Work, folder: Path) -> Outcome:
    try:
        import datasets
        import trl
        from transformers import TrainerCallback
    except ImportError as error:
        raise Unavailable(f"TRL does not import: {error}") from error
    outcome = Outcome()

    class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """From the start of the loop to the end of each step."""

        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            synchronise(setup.device)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise(setup.device)
            outcome.steps_s = time.perf_counter() - self.start

    class Timed(trl.DPOTrainer):  # type: ignore[misc,unused-ignore]
        """TRL's trainer, untouched, with its reference pass timed and its losses kept."""

        train_dataset: Any

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._prepare_dataset(dataset, *args, **kwargs) if setup.data.pairs else dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            _reset_peak(setup.device)
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            synchronise(setup.device)
            outcome.reference_s = time.perf_counter() - start
            return found

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    losses: list[Tensor] = []
    order = rival.order(work)
    args = trl.DPOConfig(
        output_dir=str(folder), beta=BETA, learning_rate=LEARNING_RATE, seed=SEED,
        per_device_train_batch_size=rival.micro or setup.pairs_per_step,
        gradient_accumulation_steps=setup.pairs_per_step // (rival.micro or setup.pairs_per_step),
        max_steps=work.steps(setup.pairs_per_step),
        train_sampling_strategy="sequential",  # the rows come in the order of the round
        use_cpu=setup.device.type == "cpu", bf16=setup.dtype is torch.bfloat16,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, **(rival.trl or {}),
    )  # fmt: skip
    model = model_of(setup, rival.half_base)
    # Without an adapter or precomputed log-probs TRL loads the policy a second time; here it gets the copy.
    second = setup.tuning == "full" and not args.precompute_ref_log_probs
    with _quiet(datasets):
        rows = datasets.Dataset.from_list([_row(setup.data, i) for i in order])
        trainer = Timed(
            model,
            ref_model=copy.deepcopy(model) if second else None,
            args=args,
            train_dataset=rows,
            processing_class=setup.data.tokenizer,
            callbacks=[Clock()],
        )
        _check_ids(trainer.train_dataset, [setup.data.groups[i] for i in order])
        if not args.precompute_ref_log_probs:
            _reset_peak(setup.device)
        trainer.train()
    outcome.peak_bytes = _peak(setup.device)
    parts = setup.pairs_per_step // (rival.micro or setup.pairs_per_step)
    outcome.losses = torch.stack(losses).float().reshape(-1, parts).mean(1).tolist()
    if args.precompute_ref_log_probs:
        columns = [trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps")]
        outcome.ref_logps = torch.tensor([list(column) for column in columns]).float().T
    return outcome


def _row(data: PairData, index: int) -> dict[str, Any]:
    """A pair as text, or as the token ids that TRL makes of text."""
    if data.pairs:
        return vars(data.pairs[index])
    group = data.groups[index]
    return {"prompt_ids": group.prompt_ids, "chosen_ids": group.responses[0], "rejected_ids": group.responses[1]}


def _check_ids(rows: Any, groups: Sequence[PrefixGroup]) -> None:
    """Check that TRL trains on our tokens."""
    for row, group in zip(rows, groups, strict=True):
        if [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] != [group.prompt_ids, *group.responses]:
            raise Unavailable("TRL's tokens of a pair differ from ours")


@contextlib.contextmanager
def _quiet(datasets: Any) -> Any:
    """Silence progress lines, and keep reference log-probs of an earlier run out of this one."""
    datasets.disable_progress_bars()
    datasets.disable_caching()
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
            yield
    finally:
        datasets.enable_caching()
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)


def cpu_peak(rival: Rival, setup: Setup, work: Work) -> int:
    """Return the most bytes that torch holds over one step with its reference pass, from making the model on."""

    def run() -> dict[str, Tensor]:
        rival.run(setup, work)
        return {}

    return memory.measure(run, setup.device, resident=False).extra


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
