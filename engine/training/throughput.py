"""What a training step achieved: useful tokens and pairs a second, model FLOP utilisation, peak memory."""

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
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.models.flops import ModelShape, Targets, Tuning, counts_of, model_flops
from macpo.engine.models.policy import PolicyModule


@dataclass(frozen=True, slots=True)
class Work:
    """Whose FLOP are counted: `model_flops` of this shape and tuning, over `peak_flops` of all ranks together."""

    shape: ModelShape
    peak_flops: float
    tuning: Tuning
    rank: int = 0
    targets: Targets = "all-linear"

    @classmethod
    def of(cls, policy: PolicyModule, ranks: int) -> Work | None:
        """None where the device's peak (`hardware.GPUS`) or the model's shape is not known."""
        gpu = hardware.of_device(policy.device)
        if gpu is None:
            return None
        try:
            shape = ModelShape.of(policy.base.config)
        except ConfigError:
            return None
        return cls(shape, gpu.bf16_flops * ranks, *tuning_of(policy))

    def utilisation(self, groups: Sequence[PrefixGroup], seconds: float) -> float:
        """FLOP that training on the groups needs, as a share of what the peak allows in that time."""
        counts = counts_of(groups, self.shape.windows)
        flops = model_flops(self.shape, counts, tuning=self.tuning, rank=self.rank, targets=self.targets)
        return flops / (seconds * self.peak_flops)


def tuning_of(policy: PolicyModule) -> tuple[Tuning, int, Targets]:
    """("full", 0, "all-linear"), or "lora" with its rank and target modules."""
    if not isinstance(policy.model, PeftModel):
        return "full", 0, "all-linear"
    config = policy.model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    targets = config.target_modules
    return "lora", config.r, targets if targets == "all-linear" else sorted(targets or ())


class Meter:
    """Rates of a stage's steps over all ranks, and the peak memory of this one.

    Args:
        groups: of the stage; `rates` is asked about some of them by index.
        device: where the policy is.
        work: for MFU; None leaves it out.
    """

    def __init__(self, groups: Sequence[PrefixGroup], device: torch.device, work: Work | None = None) -> None:
        self.groups, self.device, self.work = groups, device, work
        self._unit = "pairs_per_s" if len(groups[0].responses) == 2 else "sequences_per_s"

    @classmethod
    def of(cls, policy: PolicyModule, groups: Sequence[PrefixGroup], world: World) -> Meter:
        return cls(groups, policy.device, Work.of(policy, world.size))

    def rates(self, indices: Sequence[int], seconds: float) -> dict[str, float]:
        """Of one step over these groups.

        Returns:
            tokens_per_s: useful tokens, no padding, a shared prompt once. pairs_per_s or sequences_per_s.
            mfu: `model_flops` / (seconds · ranks · dense bf16 peak); absent where the peak is not known.
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
        """From here on counts for the peak."""
        reset_peak_memory(self.device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point: on GPUs of torch's tensors there, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks; where the system does not let a process do that, its whole life counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the resident set of now
