"""One training stage, resumable to the bit: the same loop for pretraining, SFT and preference training.

A step is exactly `settings.batch` consecutive groups of the shuffled order (the last batch of an epoch may be
smaller). Packing into micro-batches and sharding over ranks happen inside a step and only split a sum.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from macpo.engine import checkpoint
from macpo.engine.attention import attention_hook
from macpo.engine.config import OptimSettings
from macpo.engine.errors import ConfigError, DataError, NumericsError, Stopped
from macpo.engine.metrics import MetricsLog
from macpo.engine.model import PolicyModule
from macpo.engine.objectives import Objective
from macpo.engine.optim import Optimizer, learning_rate
from macpo.engine.pack import PackedBatch, PrefixGroup, pack
from macpo.engine.parallel import World
from macpo.engine.plan import Plan, fingerprint, share
from macpo.engine.trackers import Trackers


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a stage did, over all its runs and ranks."""

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
    """Train the policy's trainable parameters in place; goes on from the checkpoint in `workdir` if there is one.

    Args:
        policy: on every rank the same weights.
        groups: one is a sequence (SFT), a document (pretraining) or prompt + [chosen, rejected] (preference).
        objective: `objectives.sft()` or `objectives.preference(...)`.
        seed: of the order of the groups; the order is a function of seed and epoch alone.
        workdir: gets metrics.jsonl, timing.jsonl and checkpoint/, which the caller removes when it commits.
        ids: names of the groups for messages; default their index.
        world: the ranks that share each step; default the current process group.
        should_stop: asked after every step; true on any rank saves a checkpoint and stops all of them.
        progress: label of the progress line on standard error; None is silent.
        trackers: see every row of metrics.jsonl; what fails in them never stops training.

    Returns:
        Steps and tokens of the whole stage. On a stage that was finished before, at once, with its weights loaded.

    Raises:
        NumericsError: loss or gradient is not finite; no update was made.
        Stopped: after `should_stop`; the same call goes on from there.
        DataError: groups that do not fit. IntegrityError: checkpoints exist and none verifies.
    """
    stage = _Stage(policy, groups, objective, settings, seed, workdir, ids, world or World.current(), trackers)
    return stage.run(should_stop, progress)


class _Stage:
    def __init__(
        self,
        policy: PolicyModule,
        groups: Sequence[PrefixGroup],
        objective: Objective,
        settings: OptimSettings,
        seed: int,
        workdir: Path,
        ids: Sequence[str] | None,
        world: World,
        trackers: Trackers | None = None,
    ) -> None:
        if not groups:
            raise DataError("there is nothing to train on", "check the filters before this stage")
        objective.check(groups)
        self.policy = policy
        self.groups = groups
        self.objective = objective
        self.settings = settings
        self.workdir = workdir
        self.ids = ids
        self.world = world
        self.trackers = trackers
        self.plan = Plan(len(groups), settings.batch, settings.epochs, seed)
        self.parameters = policy.trainable_parameters()
        if not self.parameters:
            raise ConfigError("the policy has no trainable parameter", "ask the pool for it with LoRA or full tuning")
        self.optimizer = Optimizer(self.parameters, settings)
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        self.fingerprint = fingerprint(groups, settings, objective.fingerprint, seed, shapes)
        self.last: dict[str, Any] = {}
        self.saved_step: int | None = None

    def run(self, should_stop: Callable[[], bool] | None, progress: str | None) -> TrainResult:
        start = self._resume()
        planned = self.plan.num_steps
        done = start
        if start < planned:
            with self._log(start, progress) as log, attention_hook(self.policy.base):
                for step, indices in self.plan.steps(start):
                    row, stop = self._step(step, indices, should_stop)
                    self.last = row
                    done = step + 1
                    log.write(row)
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

    def _step(
        self, step: int, indices: Sequence[int], should_stop: Callable[[], bool] | None
    ) -> tuple[dict[str, Any], bool]:
        """One optimiser step; the only wait for the device is the one read of its numbers."""
        total = sum(self.objective.size(self.groups[i]) for i in indices)
        stop = should_stop is not None and should_stop()
        device = self.policy.device
        # loss, stop flag, metric sums: one vector, so that ranks exchange it together with the gradients
        stats = torch.zeros(2 + len(self.objective.metrics), device=device)
        stats[1] = float(stop)
        for batch in self._batches(indices):
            loss, sums = self.objective(self.policy, batch, total)
            loss.backward()
            stats[0] += loss.detach()
            stats[2:] += sums
        norm = self.optimizer.reduce(self.world, stats)
        loss_value, stop_value, *sums_list, norm_value = torch.cat((stats, norm[None])).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._not_finite(step, indices, loss_value, norm_value)
        rate = learning_rate(self.settings, step, self.plan.num_steps)
        self.optimizer.update(rate, norm_value)
        metrics = {name: value / total for name, value in zip(self.objective.metrics, sums_list, strict=True)}
        row = {
            "step": step + 1,
            "epoch": (step + 1) / self.plan.steps_per_epoch,
            "lr": rate,
            "loss": loss_value,
            "grad_norm": norm_value,
            "tokens": sum(self.groups[i].num_tokens for i in indices),
            **metrics,
        }
        return row, stop_value > 0

    def _batches(self, indices: Sequence[int]) -> list[PackedBatch]:
        mine = share(self.groups, indices, self.world)
        return pack(self.groups, max_tokens=self.settings.microbatch_tokens, indices=mine)

    def _not_finite(self, step: int, indices: Sequence[int], loss: float, norm: float) -> NumericsError:
        """Which groups are to blame: those whose own loss is not finite, else all of the step."""
        with torch.no_grad():
            bad = [i for i in share(self.groups, indices, self.world) if not self._finite(i)]
        bad = sorted(i for part in self.world.gather(bad) for i in part)
        blamed = bad or list(indices)
        names = [str(i) if self.ids is None else self.ids[i] for i in blamed]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        kind = "whose own loss is not finite" if bad else "of the step"
        last = "none was saved" if self.saved_step is None else f"the one of step {self.saved_step}"
        self.optimizer.zero()
        return NumericsError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; groups {kind}: {listed}; last checkpoint: {last}",
            "lower learning_rate or look at these rows; the weights were not updated",
            file=str(self.workdir),
        )

    def _finite(self, index: int) -> bool:
        (batch,) = pack(self.groups, max_tokens=1, indices=[index])
        loss, _ = self.objective(self.policy, batch, 1)
        return bool(loss.isfinite())

    def _log(self, step: int, progress: str | None) -> MetricsLog | _NoLog:
        if not self.world.is_main:
            return _NoLog()
        return MetricsLog(
            self.workdir, step=step, planned=self.plan.num_steps, progress=progress, trackers=self.trackers
        )

    def _save(self, step: int, log: MetricsLog | _NoLog) -> None:
        log.sync()
        state = {"fingerprint": self.fingerprint, "last": self.last}
        checkpoint.save(self.workdir / "checkpoint", step, self.optimizer.tensors(), state, world=self.world)
        self.saved_step = step

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the steps that are done."""
        folder = self.workdir / "checkpoint"
        found = checkpoint.load_latest(folder, world=self.world, like=self.optimizer.tensors())
        if found is None:
            return 0
        if found.state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the checkpoint belongs to other data, settings, seed or weights",
                "delete the folder to train again, or restore what it was started with",
                file=str(folder),
            )
        if found.layout != checkpoint.layout_of(found.tensors, self.world) and self.world.is_main:
            print(
                f"note: resuming a checkpoint of {found.layout} with "
                f"{checkpoint.layout_of(found.tensors, self.world)}: "
                "same sample order, results equal up to rounding, not bitwise",
                file=sys.stderr,
            )
        self.optimizer.load(found.tensors)
        self.last = found.state["last"]
        self.saved_step = found.step
        return found.step


class _NoLog:
    """The log of ranks other than 0."""

    def write(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> _NoLog:
        return self

    def __exit__(self, *_: object) -> None: ...


__all__ = ["TrainResult", "train"]
