"""What a run notes of the machine, the versions and the plan that an attempt begins with."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo import __version__
from macpo.engine.errors import MacpoError
from macpo.engine.run.attempts import typed
from macpo.engine.run.manifest import code_version
from macpo.method.run_plan import Plan
from macpo.recipe_kinds import AnyRecipe

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World

PACKAGES = ("torch", "triton", "transformers", "peft")
CPU_INFO = Path("/proc/cpuinfo")


def about(recipe: AnyRecipe, plan: Plan, world: World | None) -> dict[str, Any]:
    """The fields of an `Attempt` that are known when it begins."""
    size = 1 if world is None else world.size
    return {
        "command": typed(),
        "device": device_name(recipe),
        "processes": size,
        "jobs": recipe.compute.jobs if size == 1 else 1,
        "commit": code_version()["commit"],
        "versions": versions(),
        "flop": planned_flop(recipe, plan),
    }


def versions() -> dict[str, str]:
    """The versions of this package, of Python and of the packages that results depend on; of those that are here."""
    found = {"macpo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(recipe: AnyRecipe) -> str:
    """The GPU's name; a CPU's with the threads of each process."""
    import torch

    from macpo.engine.models.compute import device_of

    device = device_of(recipe.compute)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if CPU_INFO.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)):
        model = found[1]
    threads = recipe.compute.threads or torch.get_num_threads()
    return f"CPU: {model}, {threads} thread{'s' if threads > 1 else ''}"


def planned_flop(recipe: AnyRecipe, plan: Plan) -> dict[str, float]:
    """Stage -> FLOP as `macpo plan` counts them; empty where the models' shapes or the data cannot be read here."""
    from macpo.commands.planning.estimates import size_of, works

    try:
        run = size_of(recipe)
    except MacpoError:
        return {}
    return {name: float(flop) for name, work in works(plan) if (flop := work.cost(run).flop)}
