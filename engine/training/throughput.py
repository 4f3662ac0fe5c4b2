"""Speed of a training step: useful tokens and pairs per second, model FLOP utilisation, peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel

from macpo.engine import hardware
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.models.flops import ModelShape, Targets, Tuning, counts_of, model_flops
from macpo.engine.models.policy import PolicyModule


@dataclass(frozen=True, slots=True)
class Work:
    """A model and its tuning, whose `model_flops` are compared with `peak_flops` of all ranks together."""

    shape: ModelShape
    peak_flops: float
    tuning: Tuning
    rank: int = 0
    targets: Targets = "all-linear"

    @classmethod
    def of(cls, policy: PolicyModule, ranks: int) -> Work | None:
        """The policy's work; None if the device's peak (`hardware.GPUS`) or the model's shape is unknown."""
        gpu = hardware.of_device(policy.device)
        if gpu is None:
            return None
        try:
            shape = ModelShape.of(policy.base.config)
        except ConfigError:
            return None
        return cls(shape, gpu.bf16_flops * ranks, *tuning_of(policy))

    def utilisation(self, groups: Sequence[PrefixGroup], seconds: float) -> float:
        """FLOP required to train on the groups, as a share of the peak FLOP in that time."""
        counts = counts_of(groups, self.shape.windows)
        flops = model_flops(self.shape, counts, tuning=self.tuning, rank=self.rank, targets=self.targets)
        return flops / (seconds * self.peak_flops)


def tuning_of(policy: PolicyModule) -> tuple[Tuning, int, Targets]:
    """(tuning, rank, targets) of a policy: ("full", 0, "all-linear") or "lora" with its rank and target modules."""
    if not isinstance(policy.model, PeftModel):
        return "full", 0, "all-linear"
    config = policy.model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    targets = config.target_modules
    return "lora", config.r, targets if targets == "all-linear" else sorted(targets or ())


class Meter:
    """Measures rates of a stage's steps over all ranks, and the peak memory of this rank.

    Args:
        groups: the stage's groups, which `rates` takes by index.
        device: the policy's device.
        work: work to compute MFU from; None leaves MFU out.
    """

    def __init__(self, groups: Sequence[PrefixGroup], device: torch.device, work: Work | None = None) -> None:
        self.groups, self.device, self.work = groups, device, work
        self._unit = "pairs_per_s" if len(groups[0].responses) == 2 else "sequences_per_s"

    @classmethod
    def of(cls, policy: PolicyModule, groups: Sequence[PrefixGroup], world: World) -> Meter:
        return cls(groups, policy.device, Work.of(policy, world.size))

    def rates(self, indices: Sequence[int], seconds: float) -> dict[str, float]:
        """Rates of one step over the groups with these indices.

        Returns:
            tokens_per_s: useful tokens, without padding, a shared prompt counted once.
            pairs_per_s or sequences_per_s.
            mfu: `model_flops` / (seconds · ranks · dense bf16 peak); absent if the peak is unknown.
            peak_memory_bytes: see `peak_memory`.
        """
        seconds = max(seconds, 1e-9)
        groups = [self.groups[i] for i in indices]
        tokens = sum(group.num_tokens for group in groups)
        found = {"tokens_per_s": round(tokens / seconds, 1), self._unit: round(len(groups) / seconds, 3)}
        if self.work is not None:
            found["mfu"] = round(self.work.utilisation(groups, seconds), 5)
        return found | {"peak_memory_bytes": peak_memory(self.device)}

    def reset(self) -> None:
        """Start measuring the peak anew."""
        reset_peak_memory(self.device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of torch's tensors on a GPU, of this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Discard earlier peaks; if the system does not allow that, the process's whole life counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the resident set of now
