"""One training stage, which resumes bit-exactly: the same loop for pretraining, SFT and preference training.

A step trains on exactly `settings.batch` consecutive groups of the shuffled order (the last batch of an epoch may be
smaller). Packing into micro-batches and sharding over ranks happen inside a step and only split a sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from macpo.engine.config import OptimSettings, microbatch_tokens
from macpo.engine.console import notice, say
from macpo.engine.data.batches import BatchOrder, MicroBatch, microbatches
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.agree import agreed
from macpo.engine.distributed.failures import is_lost_peer, is_out_of_memory
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, NumericsError, PeerError, Stopped, one_line
from macpo.engine.files import sha256
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.parallelize import data_world
from macpo.engine.models.policy import PolicyModule
from macpo.engine.training import checkpoint
from macpo.engine.training.balanced import balanced
from macpo.engine.training.metrics import MetricsLog, verify
from macpo.engine.training.objectives import Objective
from macpo.engine.training.optim import Optimizer, learning_rate
from macpo.engine.training.spikes import SpikeGuard
from macpo.engine.training.throughput import Meter
from macpo.engine.training.token_budget import TokenBudget
from macpo.engine.training.trackers import Trackers, Training

"""What `train` resumes from in its folder: what can go once the weights are saved, and what stays."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Totals of a stage over all its attempts and ranks."""

    steps: int
    tokens: int
    last: dict[str, Any]
    """The last row of metrics.jsonl."""


def train(
    policy: PolicyModule,
    groups: Sequence[PrefixGroup],
    objective: Objective,
    settings: OptimSettings,
    *,
    seed: int,
    workdir: Path,
    ids: Sequence[str] | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: str | None = None,
    trackers: Trackers | None = None,
) -> TrainResult:
    """Train the policy's trainable parameters in place; resumes from the checkpoint in `workdir` if there is one.

    A step whose micro-batch does not fit in memory is repeated with smaller ones, which the stage keeps from then on
    (`OptimSettings.microbatch_tokens` is the upper bound).

    Args:
        policy: the same weights on every rank.
        groups: each is a sequence (SFT), a document (pretraining) or prompt + [chosen, rejected] (preference).
        objective: `objectives.sft()` or `objectives.preference(...)`; a mixture of experts adds its load-balancing
            loss (see `balanced`).
        seed: seed of the groups' order, which is a function of seed and epoch alone.
        workdir: gets metrics.jsonl, timing.jsonl and checkpoint/, which the caller removes when it commits.
        ids: names of the groups for messages; default their index.
        world: the ranks that share each step; default the current process group.
        should_stop: called at every step; True on any rank saves a checkpoint and stops all of them.
        progress: label of the progress line on standard error; None is silent.
        trackers: get every row of metrics.jsonl; their failures never stop training.

    Returns:
        Steps and tokens of the whole stage; for a finished stage at once, with its weights loaded.

    Raises:
        NumericsError: loss or gradient is not finite, or the loss spiked and `on_spike` is stop; no update was made.
        Stopped: `should_stop` returned True; the same call resumes.
        ResourceError: one group alone does not fit in memory, or the disk is full.
        Again: memory ran out under a collective policy, or in an update beside idle models; the same call resumes.
        PeerError: another rank failed or hangs; the message names the step.
        DataError: the groups do not fit the objective. IntegrityError: checkpoints exist and none verifies.
    """
    stage = _Stage(policy, groups, objective, settings, seed, workdir, ids, world or World.current(), trackers)
    return stage.run(should_stop, progress)


@dataclass
class _Stage:
    policy: PolicyModule
    groups: Sequence[PrefixGroup]
    objective: Objective
    settings: OptimSettings
    seed: int
    workdir: Path
    ids: Sequence[str] | None
    world: World
    trackers: Trackers | None

    def __post_init__(self) -> None:
        if not self.groups:
            raise DataError("there is nothing to train on", "check the filters before this stage")
        self.objective = balanced(self.objective, self.policy, self.groups)
        self.objective.check(self.groups)
        settings = self.settings
        self.data = data_world(self.policy, self.world)
        self.order = BatchOrder(len(self.groups), settings.batch, settings.epochs, self.seed)
        parameters = self.policy.trainable_parameters()
        if not parameters:
            raise ConfigError("the policy has no trainable parameter", "load it with LoRA or full tuning")
        self.optimizer = Optimizer(parameters, settings)
        shapes = {name: list(p.shape) for name, p in parameters.items()}
        self.fingerprint = fingerprint(self.groups, settings, self.objective.fingerprint, self.seed, shapes)
        self.last: dict[str, Any] = {}
        self.saved_step: int | None = None
        tokens = microbatch_tokens(settings.microbatch_tokens, self.policy.device.type)
        self.budget = TokenBudget(tokens, self.workdir / "checkpoint", self.world)
        self.guard = None if settings.spike_sigma is None else SpikeGuard(settings.spike_sigma)

    def run(self, should_stop: Callable[[], bool] | None, progress: str | None) -> TrainResult:
        start = self._resume()
        self.budget.recall()
        planned = self.order.num_steps
        done = start
        if start < planned:
            with self._log(start, progress) as log, attention_hook(self.policy.base):
                for step, indices in self.order.steps(start):
                    with self._named(step):
                        row, stop = self._step(step, indices, should_stop, log)
                        self.last = row
                        done = step + 1
                        log.write(row, indices)
                        stop = stop and done < planned
                        if stop or done == planned or done % self.settings.save_every_steps == 0:
                            self._save(done, log)
                    if stop:
                        raise Stopped(f"stopped after step {done} of {planned}, saved", "run the same command again")
        elif self.world.is_main:
            self._log(start, None).close()  # a kill may have come between the checkpoint and the last log line
        self.world.barrier()
        if done != planned:
            raise AssertionError(f"{done} steps done, {planned} planned")
        return TrainResult(planned, self.settings.epochs * sum(g.num_tokens for g in self.groups), self.last)

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """Add the step to errors about peers and memory."""
        try:
            yield
        except PeerError as error:
            (problem,) = error.problems
            raise PeerError(f"step {step + 1}: {problem.message}", problem.fix, file=self.workdir) from error
        except (RuntimeError, MemoryError) as error:
            if is_lost_peer(error):
                why = one_line(error)
                what = f"step {step + 1}: another rank failed or hangs, noticed in the model ({why})"
                fix = "look at the first failing rank's message, then run the same command again"
                raise PeerError(what, fix, file=self.workdir) from error
            if is_out_of_memory(error):  # not in a micro-batch: `_accumulate` handles those
                raise self.budget.no_room(f"step {step + 1}", error) from error
            raise

    def _step(
        self, step: int, indices: Sequence[int], should_stop: Callable[[], bool] | None, log: MetricsLog | _NoLog
    ) -> tuple[dict[str, Any], bool]:
        """Make one optimiser step; reading its numbers is the only wait for the device."""
        total = sum(self.objective.size(self.groups[i]) for i in indices)
        self.objective.begin(step / self.order.num_steps)
        stop = should_stop is not None and should_stop()
        stats = self._gradients(step, indices, total)
        stats[0] = float(stop)
        if self.data.size != self.world.size:  # the sum below leaves out the other ranks of a tensor-parallel group
            self.world.sum_(stats[:1])
        norm = self.optimizer.reduce(self.data, stats)
        stop_value, shrunk, loss, *sums, norm_value = torch.cat((stats, norm[None])).tolist()
        if shrunk:
            self.budget.agree(f"step {step + 1}")
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise self._not_finite(step, indices, loss, norm_value)
        spike = self._spike(step, indices, loss, log)
        rate = learning_rate(self.settings, step, self.order.num_steps)
        self.optimizer.update(rate, norm_value)
        metrics = {name: value / total for name, value in zip(self.objective.metrics, sums, strict=True)}
        row = {
            "step": step + 1,
            "epoch": (step + 1) / self.order.steps_per_epoch,
            "lr": rate,
            "loss": loss,
            "grad_norm": norm_value,
            "tokens": sum(self.groups[i].num_tokens for i in indices),
            **metrics,
        }
        return row | ({} if spike is None else {"spike": spike}), stop_value > 0

    def _gradients(self, step: int, indices: Sequence[int], total: int) -> Tensor:
        """Compute the gradients of this rank's groups.

        Returns [3 + metrics]: room for the stop flag, how often memory ran out, loss, metric sums; one vector, which
        ranks exchange together with the gradients.
        """
        failures = 0
        while True:
            stats = torch.zeros(3 + len(self.objective.metrics), device=self.policy.device)
            stats[1] = float(failures)
            parts = microbatches(self.groups, indices, self.budget.tokens, self.data, collective=self.policy.collective)
            for number, micro in enumerate(parts, start=1):
                self.policy.synchronise(last=number == len(parts))
                if not self._accumulate(micro, total, stats):
                    break
            else:
                return stats
            self.optimizer.zero()  # including what a partial backward has accumulated
            failures += self.budget.shrink(
                f"step {step + 1}", micro.batch, self._names(micro.batch.groups), collective=self.policy.collective
            )

    def _accumulate(self, micro: MicroBatch, total: int, stats: Tensor) -> bool:
        """Run forward and backward; returns False if memory ran out."""
        try:
            loss, sums = self.objective(self.policy, micro.batch, total)
            if micro.filler:
                loss, sums = loss * 0.0, sums * 0.0
            loss.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        stats[2] += loss.detach()
        stats[3:] += sums
        return True

    # --- numbers that cannot be right ---

    def _spike(self, step: int, indices: Sequence[int], loss: float, log: MetricsLog | _NoLog) -> float | None:
        """How many deviations a spike lies above the recent mean; None for any other loss.

        Raises:
            NumericsError: with `on_spike: stop`, after saving the state from before the step.
        """
        if self.guard is None:
            return None
        score = self.guard.judge(loss)
        if score is not None:
            what = f"step {step + 1}: loss {loss:.4f} is {score:.1f} standard deviations above its recent mean"
            if self.settings.on_spike == "stop":
                self.optimizer.zero()
                if self.saved_step != step:
                    self._save(step, log)
                problem = f"{what}; groups of the step: {self._names(indices)}; last checkpoint: the one of step {step}"
                fix = "look at these rows, lower learning_rate, or set on_spike to warn; the weights were not updated"
                raise self._numerics(problem, fix)
            if self.world.is_main:
                say(f"warning: {what}; groups of the step: {self._names(indices)}")
        self.guard.see(loss)
        return score

    def _not_finite(self, step: int, indices: Sequence[int], loss: float, norm: float) -> NumericsError:
        """The error that names the groups whose own loss is not finite, else all of the step."""
        alone = microbatches(self.groups, indices, 1, self.data, collective=self.policy.collective)
        with torch.no_grad():
            bad = [micro.batch.groups[0] for micro in alone if not self._finite(micro.batch) and not micro.filler]
        bad = sorted({i for part in self.world.gather(bad) for i in part})
        kind = "whose own loss is not finite" if bad else "of the step"
        last = "none was saved" if self.saved_step is None else f"the one of step {self.saved_step}"
        self.optimizer.zero()
        return self._numerics(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; groups {kind}: {self._names(bad or indices)}; "
            f"last checkpoint: {last}",
            "lower learning_rate or look at these rows; the weights were not updated",
        )

    def _numerics(self, message: str, fix: str) -> NumericsError:
        """An error to raise on every rank, reported by one."""
        return NumericsError(message, fix, file=self.workdir, relayed=not self.world.is_main)

    def _finite(self, batch: PackedBatch) -> bool:
        loss, _ = self.objective(self.policy, batch, 1)
        return bool(loss.isfinite())

    def _names(self, indices: Sequence[int]) -> str:
        names = [str(i) if self.ids is None else self.ids[i] for i in indices]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    # --- log and checkpoints ---

    def _log(self, step: int, progress: str | None) -> MetricsLog | _NoLog:
        if not self.world.is_main:
            return _NoLog()
        counts = {"seed": self.seed, "groups": len(self.groups), "steps": self.order.num_steps}
        return MetricsLog(
            self.workdir,
            step=step,
            planned=self.order.num_steps,
            progress=progress,
            trackers=self.trackers,
            meter=Meter.of(self.policy, self.groups, self.world),
            training=Training(self.fingerprint, self.settings.model_dump(mode="json") | counts),
        )

    def _save(self, step: int, log: MetricsLog | _NoLog) -> None:
        state = {"fingerprint": self.fingerprint, "last": self.last, "microbatch_tokens": self.budget.tokens}
        state["steps"] = self.order.num_steps
        if self.guard is not None:
            state["guard"] = self.guard.state_dict()
        with log.saving():
            log.sync()
            if self.world.is_main:
                state["metrics_sha256"] = sha256(self.workdir / "metrics.jsonl")
            checkpoint.save(self.workdir / "checkpoint", step, self.optimizer.tensors(), state, world=self.world)
        self.saved_step = step

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the steps that are done."""
        folder = self.workdir / "checkpoint"
        found = checkpoint.load_latest(folder, world=self.world, like=self.optimizer.tensors())
        if found is None:
            return 0
        if found.state["fingerprint"] != self.fingerprint:
            fix = "delete the folder to train again, or restore what it was started with"
            raise ConfigError("the checkpoint belongs to other data, settings, seed or weights", fix, file=folder)
        with agreed(self.world):
            if self.world.is_main and "metrics_sha256" in found.state:  # an older version did not save it
                verify(self.workdir, found.step, found.state["metrics_sha256"])
        if found.layout != checkpoint.layout_of(found.tensors, self.world) and self.world.is_main:
            now = checkpoint.layout_of(found.tensors, self.world)
            notice(
                f"note: resuming a checkpoint of {found.layout} with {now}: "
                "same sample order, results equal up to rounding, not bitwise"
            )
        self.optimizer.load(found.tensors)
        self.last = found.state["last"]
        self.budget.tokens = found.state["microbatch_tokens"]
        if self.guard is not None and "guard" in found.state:
            self.guard.load_state(found.state["guard"])
        self.saved_step = found.step
        return found.step


class _NoLog:
    """The log of ranks other than 0, which writes nothing."""

    def write(self, row: dict[str, Any], indices: Sequence[int]) -> None: ...

    def saving(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> _NoLog:
        return self

    def __exit__(self, *_: object) -> None: ...


def fingerprint(
    groups: Sequence[PrefixGroup], settings: OptimSettings, objective: str, seed: int, shapes: Mapping[str, list[int]]
) -> str:
    """SHA-256 of everything that further training depends on, except the checkpoint's own weights."""
    # save interval and spike handling do not change what is trained
    plain = settings.model_dump(mode="json", exclude={"save_every_steps", "spike_sigma", "on_spike"})
    plain["microbatch_tokens"] = microbatch_tokens(settings.microbatch_tokens, "cuda")  # the same wherever it goes on
    digest = hashlib.sha256(json.dumps([plain, objective, seed, dict(shapes)], sort_keys=True).encode())
    for group in groups:
        for ids in (group.prompt_ids, *group.responses):
            numbers = array("q", [len(ids), *ids])
            if sys.byteorder == "big":
                numbers.byteswap()
            digest.update(numbers.tobytes())
        digest.update(b"|")
    return digest.hexdigest()
