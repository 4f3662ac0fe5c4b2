"""`macpo plan` without a recipe: which settings train a shape on some GPUs, and the table of the paper's sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.errors import ConfigError
from macpo.engine.hardware import GPUS, Gpu, of_device
from macpo.engine.models.flops import ModelShape
from macpo.engine.planning.calibrate import calibrate
from macpo.engine.planning.fitting import GPUS_PER_NODE, Option, Workload, options
from macpo.engine.planning.memory import Setup
from macpo.engine.planning.shapes import config_of
from macpo.engine.planning.step_time import Machine

BEST, REST = 12, 8
STUDENT, TEACHER = "llama-3-70b", "llama-3-8b"
NODES = (1, 2, 8)
RANK = 16
NOTES = (
    "Step time: eager operators, without the reference pass; from stated peaks unless --calibrate.",
    "GB a GPU: all tensors at the worst moment, 4% that the allocator loses, 1.2 GB of the driver's.",
)


WITHOUT_RECIPE = (
    "model", "table", "tuning", "pairs", "prompt_tokens", "response_tokens", "microbatch_tokens",
)  # fmt: skip
"""Options of the command that a recipe settles itself."""


def show(arguments: argparse.Namespace) -> str:
    """What the command's options ask for, as text. Raises ConfigError where they do not go together."""
    given = {"pairs": arguments.pairs, "prompt": arguments.prompt_tokens, "response": arguments.response_tokens}
    given["microbatch_tokens"] = arguments.microbatch_tokens
    work = Workload(**{name: value for name, value in given.items() if value is not None})
    gpu = arguments.gpu or "h100"
    if arguments.overrides or arguments.print_config:
        raise ConfigError("--set and --print-config are for a recipe", "name one")
    if arguments.table:
        if arguments.model or arguments.gpus or arguments.tuning or arguments.calibrate:
            raise ConfigError("--table shows its own models, tunings and GPUs", "give it --gpu and a workload alone")
        return show_table(gpu, work)
    if not arguments.model:
        raise ConfigError("there is nothing to plan", "name a recipe, --model or --table")
    tuning = arguments.tuning or "lora"
    machine = _measured(gpu_of(gpu), tuning) if arguments.calibrate else None
    return show_options(arguments.model, gpu, arguments.gpus or 8, tuning, work, machine)


def _measured(gpu: Gpu, tuning: str) -> Machine:
    """The GPU's machine, scaled by a step on it. Raises ConfigError where this machine has another one, or none."""
    if not torch.cuda.is_available() or of_device("cuda") != gpu:
        raise ConfigError(f"there is no {gpu.name} here to measure a step on", "leave out --calibrate")
    return calibrate(Setup(tuning_of(tuning)), Machine.of_gpu(gpu))


def gpu_of(name: str) -> Gpu:
    """Of `hardware.GPUS`, in any case. Raises ConfigError."""
    if name.upper() not in GPUS:
        raise ConfigError(f"there is no GPU {name!r} in the table", f"one of {', '.join(GPUS).lower()}")
    return GPUS[name.upper()]


def tuning_of(name: str) -> LoraSettings | FullSettings:
    """`lora`: rank 16 on every linear module; `full`."""
    return FullSettings() if name == "full" else LoraSettings(rank=RANK, target_modules="all-linear")


def show_options(
    model: str, gpu_name: str, gpus: int, tuning: str, work: Workload, machine: Machine | None = None
) -> str:
    """Every setting for one model, best first, as text.

    Raises:
        ConfigError: an unknown model or GPU, or a number of GPUs that fills no nodes.
    """
    gpu, config = gpu_of(gpu_name), config_of(model)
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise ConfigError(f"{gpus} GPUs are no whole number of nodes of {GPUS_PER_NODE}", "plan for whole nodes")
    found = options(config, gpu, gpus, tuning_of(tuning), work, machine=machine)
    fit = [each for each in found if each.fits]
    lines = [
        f"{_short(model)} ({ModelShape.of(config).num_parameters / 1e9:.2f}B), {tuning} tuning, {gpus} x {gpu.name} of "
        f"{gpu.memory_bytes / 1e9:.0f} GB",
        _work(work),
        f"{len(fit)} of {len(found)} settings fit" + ("; best first" if fit else "; least memory first"),
        "",
        f"{'sharding':10} {'TP':>2} {'checkpoint':11} {'base':5} {'weights':>8} {'states':>7} {'activ.':>7} "
        f"{'GB a GPU':>8} {'step s':>7} {'pairs/s':>7}  why not",
    ]
    shown = fit[:BEST] + [each for each in found if not each.fits][:REST]
    lines += [_line(each, work) for each in shown]
    if len(found) > len(shown):
        lines.append(f"... and {len(found) - len(shown)} more")
    if fit:
        lines += ["", f"checkpoint in a stage: {fit[0].checkpoint / 1e9:.2f} GB, of all ranks together"]
    return "\n".join([*lines, "", *NOTES])


def _line(each: Option, work: Workload) -> str:
    memory, parallel = each.memory, each.setup.parallel
    states = memory.gradients + memory.optimizer
    activations = memory.saved + memory.head + memory.scratch
    kind = parallel.checkpointing + ("+host" if parallel.offload_activations else "")
    weights = memory.weights + memory.pooled + memory.gathered
    return (
        f"{parallel.sharding:10} {parallel.tensor:2} {kind:11} {_base(each):5} {_gb(weights):>8} "
        f"{_gb(states):>7} {_gb(activations):>7} {memory.device / 1e9:8.1f} {each.time.total:7.2f} "
        f"{work.pairs / each.time.total:7.1f}  {each.why_not}"
    ).rstrip()


def show_table(gpu_name: str, work: Workload) -> str:
    """A 70B student and its 8B teachers on 1, 2 and 8 nodes of 8 GPUs: the best settings, and how many fit."""
    gpu = gpu_of(gpu_name)
    lines = [
        f"{STUDENT} as student, {TEACHER} as teacher, on nodes of {GPUS_PER_NODE} x {gpu.name} of "
        f"{gpu.memory_bytes / 1e9:.0f} GB",
        _work(work),
        "",
        f"{'model':12} {'tuning':6} {'nodes':>5} {'GB a GPU':>8} {'step s':>7} {'ckpt GB':>8} {'fit':>6}  "
        "best settings",
    ]
    for model in (STUDENT, TEACHER):
        config = config_of(model)
        for tuning in ("lora", "full"):
            for nodes in NODES:
                found = options(config, gpu, nodes * GPUS_PER_NODE, tuning_of(tuning), work)
                best, fit = found[0], sum(each.fits for each in found)
                lines.append(
                    f"{model:12} {tuning:6} {nodes:5} {best.memory.device / 1e9:8.1f} {best.time.total:7.2f} "
                    f"{best.checkpoint / 1e9:8.2f} {f'{fit}/{len(found)}':>6}  "
                    + (_settings(best) if fit else f"none: {best.why_not} at least")
                )
    return "\n".join([*lines, "", *NOTES])


def _settings(each: Option) -> str:
    parallel = each.setup.parallel
    parts: list[str] = [parallel.sharding]
    parts += [f"tensor {parallel.tensor}"] if parallel.tensor > 1 else []
    parts += [f"{parallel.checkpointing} checkpointing"] if parallel.checkpointing != "off" else []
    parts += ["4-bit base"] if each.four_bits else []
    parts += ["activations on the host"] if parallel.offload_activations else []
    return ", ".join(parts)


def _base(each: Option) -> str:
    return "fp32" if each.setup.full else "nf4" if each.four_bits else "bf16"


def _work(work: Workload) -> str:
    return f"{work.pairs} pairs a step of {work.prompt} + 2 x {work.response} tokens"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _short(model: str) -> str:
    return Path(model).name
